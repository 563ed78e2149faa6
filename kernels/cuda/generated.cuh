// What generated kernels share: positions that are computed on the device. `Index` is the type of positions, `u32` where
// all of them fit.

/// A position that may be negative, from arithmetic modulo two to the bits of an index.
DEVICE i64 signed_index(u32 position) { return static_cast<i32>(position); }
DEVICE i64 signed_index(u64 position) { return static_cast<i64>(position); }

/// The nearest position below `size`.
DEVICE Index edge(i64 position, i64 size) {
    return static_cast<Index>(position < 0 ? 0 : position >= size ? size - 1 : position);
}

/// Continued from the other side.
DEVICE Index wrap(i64 position, i64 size) {
    const i64 remainder = position % size;
    return static_cast<Index>(remainder < 0 ? remainder + size : remainder);
}

/// Mirrored at the first and the last element, which are not repeated.
DEVICE Index reflect(i64 position, i64 size) {
    const i64 period = size > 1 ? 2 * (size - 1) : 1;
    const i64 phase = static_cast<i64>(wrap(position, period));
    return edge(phase < period - phase ? phase : period - phase, size);
}

/// The position that an index of a gather means. One outside is reported, and moved inside, so that no memory beyond is
/// read.
DEVICE Index resolve(i64 index, i64 size, u32* fault) {
    const i64 position = index < 0 ? index + size : index;
    if (position < 0 || position >= size) *fault = 1;
    return edge(position, size);
}

/// Weight of an input element at a distance: triangle, or the cubic convolution of Keys (1981). Each operation is
/// rounded, so that what is truncated to integers afterwards does not depend on how they are merged.
DEVICE f32 triangle(f32 distance) { return fmaxf(__fsub_rn(1.0f, fabsf(distance)), 0.0f); }
DEVICE f32 cubic(f32 distance, f32 a) {
    const f32 x = fabsf(distance);
    if (x <= 1.0f) {
        const f32 slope = __fsub_rn(__fmul_rn(__fadd_rn(a, 2.0f), x), __fadd_rn(a, 3.0f));
        return __fadd_rn(__fmul_rn(__fmul_rn(slope, x), x), 1.0f);
    }
    if (x < 2.0f) {
        const f32 slope = __fsub_rn(__fmul_rn(a, x), __fmul_rn(5.0f, a));
        return __fsub_rn(__fmul_rn(__fadd_rn(__fmul_rn(slope, x), __fmul_rn(8.0f, a)), x), __fmul_rn(4.0f, a));
    }
    return 0.0f;
}
