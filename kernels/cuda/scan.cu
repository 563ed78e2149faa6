// Cumulative sums, products and extrema along an axis. Floats are accumulated in `f64`: what is far along a line is
// the sum of much.
//
// Above: Index, Element, COMBINE, EXCLUSIVE, REVERSE, LINES, LENGTH, INNER and, for blocks, THREADS and EACH.

enum : int { SUM, PROD, MAX, MIN };

template <typename T, bool IS_FLOAT>
struct SumOf {
    typedef T Type;
};
template <typename T>
struct SumOf<T, true> {
    typedef f64 Type;
};
typedef Computed<Element> Value;
typedef SumOf<Value, Traits<Value>::is_float>::Type Total;

DEVICE Total identity() {
    if constexpr (COMBINE == PROD) return static_cast<Total>(1);
    if constexpr (COMBINE == MAX) return Traits<Total>::lowest();
    if constexpr (COMBINE == MIN) return Traits<Total>::highest();
    return static_cast<Total>(0);
}

DEVICE Total combine(Total before, Total after) {
    if constexpr (COMBINE == PROD) return scalar::mul(before, after);
    if constexpr (COMBINE == MAX) return scalar::larger(before, after);
    if constexpr (COMBINE == MIN) return scalar::smaller(before, after);
    return scalar::add(before, after);
}

DEVICE Total in(Element x) { return static_cast<Total>(widen(x)); }
DEVICE Element out(Total x) { return narrow<Element>(static_cast<Value>(x)); }

/// Where the element that is `step`-th in the order of the scan lies.
DEVICE Index at(Index step) { return (REVERSE ? LENGTH - 1 - step : step) * INNER; }

DEVICE Index start_of(Index line) { return line / INNER * (LENGTH * INNER) + line % INNER; }

#if SCAN_BLOCKS

/// A block for each line.
DEVICE void scan_blocks(const void* input, void* output) {
    constexpr int WARPS = THREADS / 32;
    __shared__ Total of_warps[WARPS];
    const Index start = start_of(blockIdx.x);
    const Element* x = static_cast<const Element*>(input) + start;
    Element* y = static_cast<Element*>(output) + start;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Total carry = identity();
    if (blockIdx.x >= LINES) return;
    for (Index first = 0; first < LENGTH; first += THREADS * EACH) {
        const Index own = first + threadIdx.x * EACH;
        Total elements[EACH];
        Total sum = identity();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            elements[i] = own + i < LENGTH ? in(x[at(own + i)]) : identity();
            sum = combine(sum, elements[i]);
        }
        // Sums of all elements up to this thread's, in its warp.
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const Total before = shuffle_up(sum, distance);
            if (lane >= distance) sum = combine(before, sum);
        }
        __syncthreads();
        if (lane == 31) of_warps[warp] = sum;
        __syncthreads();
        Total before = carry;
        for (int i = 0; i < WARPS; ++i) {
            if (i < warp) before = combine(before, of_warps[i]);
            carry = combine(carry, of_warps[i]);
        }
        const Total in_warp = shuffle_up(sum, 1);
        if (lane > 0) before = combine(before, in_warp);
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const Total after = combine(before, elements[i]);
            if (own + i < LENGTH) y[at(own + i)] = out(EXCLUSIVE ? before : after);
            before = after;
        }
    }
}

#else

/// A thread for each line.
DEVICE void scan_threads(const void* input, void* output) {
    const Index line = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (line >= LINES) return;
    const Element* x = static_cast<const Element*>(input) + start_of(line);
    Element* y = static_cast<Element*>(output) + start_of(line);
    Total before = identity();
#pragma unroll 4
    for (Index step = 0; step < LENGTH; ++step) {
        const Total after = combine(before, in(x[at(step)]));
        y[at(step)] = out(EXCLUSIVE ? before : after);
        before = after;
    }
}

#endif
