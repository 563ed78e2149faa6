// What kernels share whose threads work together: exchanges between lanes and reductions over groups of threads.

/// Where a place in shared memory is, as instructions want it.
DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

/// `x` after `exchange` has replaced each of its words, of four bytes, by another lane's.
template <typename T, typename F>
DEVICE T by_words(T x, F exchange) {
    constexpr int WORDS = (sizeof(T) + 3) / 4;
    union Words {
        u32 words[WORDS];
        T value;
        DEVICE Words() {}
    } box;
    box.value = x;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) box.words[i] = exchange(box.words[i]);
    return box.value;
}

/// `x` of the lane whose number differs in the bits of `mask`.
template <typename T>
DEVICE T shuffle_xor(T x, int mask) {
    return by_words(x, [&](u32 word) { return __shfl_xor_sync(0xffffffffu, word, mask); });
}

/// `x` of the lane `distance` before this one; its own in the first lanes.
template <typename T>
DEVICE T shuffle_up(T x, int distance) {
    return by_words(x, [&](u32 word) { return __shfl_up_sync(0xffffffffu, word, distance); });
}

/// Combines over each group of `THREADS` neighbouring threads, a power of two; all of them get the result, in an
/// order that depends on nothing but positions. All threads of the block must call it.
template <int THREADS, typename T, typename F>
DEVICE T group_combine(T x, F combine) {
    constexpr int LANES = THREADS < 32 ? THREADS : 32;
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) x = combine(x, shuffle_xor(x, mask));
    if constexpr (THREADS > 32) {
        constexpr int WARPS = THREADS / 32;
        __shared__ T partial[32];
        const int warp = threadIdx.x / 32;
        // The results of an earlier call may still be read.
        __syncthreads();
        if (threadIdx.x % 32 == 0) partial[warp] = x;
        __syncthreads();
        const int first = warp / WARPS * WARPS;
        x = partial[first];
#pragma unroll
        for (int i = 1; i < WARPS; ++i) x = combine(x, partial[first + i]);
    }
    return x;
}

template <int THREADS, typename T>
DEVICE T group_sum(T x) {
    return group_combine<THREADS>(x, [](T a, T b) { return a + b; });
}

/// The largest number; NaN is passed over.
DEVICE f32 largest(f32 a, f32 b) { return fmaxf(a, b); }
DEVICE f64 largest(f64 a, f64 b) { return fmax(a, b); }
