// What kernels of attention share: which keys a query sees, scores, tiles in shared memory, and tensor cores.
//
// Above: Index, Element, Mask, HEADS, HEADS_PER_GROUP, QUERIES, KEYS, FEATURES, VALUES, SCALE, SOFTCAP, HAS_SOFTCAP,
// CAUSAL, MASK, strides X_BATCH, X_HEAD, X_ROW, X_COLUMN of Q, K, V, M and O, and offsets X_START.

enum : int { CAUSAL_NONE, CAUSAL_FROM_START, CAUSAL_FROM_END };
enum : int { MASK_NONE, MASK_BOOL, MASK_ADD };

typedef Computed<Element> Value;

/// Keys that a query sees, from the first on.
DEVICE int visible(int query) {
    if constexpr (CAUSAL == CAUSAL_NONE) return KEYS;
    const i64 count = static_cast<i64>(query) + 1 + (CAUSAL == CAUSAL_FROM_END ? static_cast<i64>(KEYS) - QUERIES : 0);
    return count < 0 ? 0 : count < KEYS ? static_cast<int>(count) : KEYS;
}

/// The score as the softmax takes it. In natural units: a mask of the lowest number a type has stays finite.
template <typename T>
DEVICE T adjusted(T product, const Mask* mask) {
    T score = product * static_cast<T>(SCALE);
    if constexpr (HAS_SOFTCAP) score = static_cast<T>(SOFTCAP) * scalar::tanh(score / static_cast<T>(SOFTCAP));
    if constexpr (MASK == MASK_ADD) score += static_cast<T>(widen(*mask));
    if constexpr (MASK == MASK_BOOL) {
        if (widen(*mask) == 0) score = Traits<T>::lowest();
    }
    return score;
}

// ---- Tiles in shared memory ---------------------------------------------------------------------------------------

DEVICE void copy_async(void* to, const void* from, bool is_inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(is_inside ? 16 : 0)
                 : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait() { asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory"); }

/// Copies `ROWS` rows of `WIDTH` elements, those from `rows` on and the padding as zeros; this is thread `thread` of the
/// `COUNT` that do.
template <int COUNT, int ROWS, int WIDTH, int PADDED, int PITCH, bool IS_WIDE, u64 ROW, u64 COLUMN, typename T>
DEVICE void load_tile(T* to, const T* from, int rows, int thread) {
    constexpr int UNIT = IS_WIDE ? 16 / sizeof(T) : 1;
    constexpr int UNITS = PADDED / UNIT;
#pragma unroll 4
    for (int i = thread; i < ROWS * UNITS; i += COUNT) {
        const int row = i / UNITS, column = i % UNITS * UNIT;
        const bool is_inside = row < rows && column < WIDTH;
        const T* source = from + (is_inside ? row * static_cast<Index>(ROW) + column * static_cast<Index>(COLUMN) : 0);
        T* target = to + row * PITCH + column;
        if constexpr (IS_WIDE) {
            copy_async(target, source, is_inside);
        } else {
            *target = is_inside ? *source : T();
        }
    }
}

// ---- Tensor cores -------------------------------------------------------------------------------------------------

// Fragments as the PTX manual lays them out for mma.m16n8k16: a thread holds rows `lane / 4` and that plus 8, columns
// `lane % 4 * 2` and the one after it.

constexpr f32 LOG2_E = 1.4426950408889634f;

DEVICE void load_matrices(u32 (&to)[4], const u16* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(from))
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&to)[4], const u16* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(from))
                 : "memory");
}

DEVICE void multiply(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply(f32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE u32 pair(f32 low, f32 high, f16) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
DEVICE u32 pair(f32 low, f32 high, bf16) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE f32 power_of_two(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE f32 exponential(f32 x) { return power_of_two(x * LOG2_E); }
