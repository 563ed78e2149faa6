// A cluster: neighbouring blocks that run at once, write to each other's shared memory, and wait for each other.
//
// Above: BLOCKS of a cluster. With one, nothing here needs an architecture that has clusters.

DEVICE void store_remote(u32 to, f32 x) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" : : "r"(to), "f"(x) : "memory");
}
DEVICE void store_remote(u32 to, f64 x) {
    asm volatile("st.shared::cluster.f64 [%0], %1;" : : "r"(to), "d"(x) : "memory");
}
template <typename T>
DEVICE void store_remote(u32 to, T x) {
    asm volatile("st.shared::cluster.b16 [%0], %1;" : : "r"(to), "h"(x.bits) : "memory");
}

/// Writes to the same place in the shared memory of all blocks of the cluster.
template <typename T>
DEVICE void share(T* to, T x) {
    if constexpr (BLOCKS == 1) {
        *to = x;
    } else {
#pragma unroll
        for (int rank = 0; rank < BLOCKS; ++rank) {
            u32 remote;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(to)), "r"(rank));
            store_remote(remote, x);
        }
    }
}

/// Says that this thread has come so far. All threads of the cluster must call it and `await`, in turn.
DEVICE void arrive() {
    if constexpr (BLOCKS > 1) asm volatile("barrier.cluster.arrive.release;" : : : "memory");
}

/// Waits for all threads of the cluster to have arrived, and sees what they wrote before.
DEVICE void await() {
    if constexpr (BLOCKS == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.wait.acquire;" : : : "memory");
    }
}

/// Waits for all threads of the cluster, and sees what they wrote. All of them must call it equally often.
DEVICE void meet() {
    arrive();
    await();
}

// ---- What is sent once, and counted: cheaper than meeting, where all that is waited for are these bytes ------------

/// Makes a barrier in shared memory that waits for so many bytes. By one thread, before it arrives where others wait.
DEVICE void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" : : "r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 :
                 : "r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

DEVICE void store_counted(u32 to, f32 x, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                 :
                 : "r"(to), "f"(x), "r"(barrier)
                 : "memory");
}
DEVICE void store_counted(u32 to, f64 x, u32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f64 [%0], %1, [%2];"
                 :
                 : "r"(to), "d"(x), "r"(barrier)
                 : "memory");
}

/// Writes to the same place in the shared memory of block `rank` of the cluster, whose barrier counts the bytes.
template <typename T>
DEVICE void send(int rank, T* to, T x, u64* barrier) {
    u32 remote, counts;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counts) : "r"(shared_address(barrier)), "r"(rank));
    store_counted(remote, x, counts);
}

/// Waits for all bytes that the barrier of this block expects, and sees them.
DEVICE void receive(u64* barrier) {
    u32 done = 0;
    while (done == 0) {
        asm volatile("{\n\t.reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(done)
                     : "r"(shared_address(barrier))
                     : "memory");
    }
}
