// Softmax and its logarithm.
//
// Above: Index, Element, LOG, LINES, LENGTH and, for rows, those of a row and HELD, for columns, INNER and SPLITS.

typedef Computed<Element> Value;

DEVICE Value finish(Value x, Value max, Value scale) {
    if constexpr (LOG) return x - max - scale;
    return scalar::exp(x - max) * scale;
}

/// What `finish` multiplies with or subtracts.
DEVICE Value scale_of(Value sum) {
    if constexpr (LOG) return scalar::log(sum);
    return static_cast<Value>(1) / sum;
}

/// The largest so far and the sum of exponentials relative to it. Nothing but infinities, or NaN, ends as NaN.
struct Running {
    Value max;
    Value sum;
};

DEVICE Running nothing_yet() { return Running{Traits<Value>::lowest(), static_cast<Value>(0)}; }

DEVICE Running with(Running state, Value x) {
    if (x > state.max) return Running{x, state.sum * scalar::exp(state.max - x) + static_cast<Value>(1)};
    // Equals are told apart because infinities cannot be subtracted.
    state.sum += x == state.max ? static_cast<Value>(1) : scalar::exp(x - state.max);
    return state;
}

DEVICE Running merge(Running a, Running b) {
    const Value max = largest(a.max, b.max);
    const Value of_a = a.max == max ? a.sum : a.sum * scalar::exp(a.max - max);
    const Value of_b = b.max == max ? b.sum : b.sum * scalar::exp(b.max - max);
    return Running{max, of_a + of_b};
}

// A sum of many terms drifts from the truth: it is made of sums of `RUN` terms.
constexpr Index RUN = 256;

/// Combines a thread's steps, every `STRIDE`-th of `STEPS`: `over(first, end, state)` those from `first` to `end`.
template <Index STEPS, Index STRIDE, typename F>
DEVICE Running in_runs(F over) {
    Running state = nothing_yet();
    if constexpr (STEPS / STRIDE > RUN) {
        for (Index first = 0; first < STEPS; first += STRIDE * RUN) {
            Running run = nothing_yet();
            over(first, STEPS - first > STRIDE * RUN ? first + STRIDE * RUN : STEPS, run);
            state = merge(state, run);
        }
    } else {
        over(0, STEPS, state);
    }
    return state;
}

/// NaN where the largest is infinite.
DEVICE Value total(Running state) { return state.sum + (state.max - state.max); }

#if SOFTMAX_ROWS

DEVICE void softmax_rows(const void* input, void* output) {
    typedef Pack<Element, VECTOR> Chunk;
    constexpr Index CHUNKS = LENGTH / VECTOR;
    const Index row = static_cast<Index>(blockIdx.x) * ROWS_PER_BLOCK + threadIdx.x / THREADS;
    const Index thread = threadIdx.x % THREADS;
    const bool is_row = row < LINES;
    const Chunk* x = reinterpret_cast<const Chunk*>(static_cast<const Element*>(input) + (is_row ? row : 0) * LENGTH);
    Chunk* y = reinterpret_cast<Chunk*>(static_cast<Element*>(output) + (is_row ? row : 0) * LENGTH);
    if constexpr (HELD) {
        Value held[PACKS][VECTOR];
        Value max = Traits<Value>::lowest();
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const Index at = i * THREADS + thread;
            if (at < CHUNKS) {
                const Chunk chunk = x[at];
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    held[i][j] = widen(chunk.at[j]);
                    max = largest(max, held[i][j]);
                }
            } else {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) held[i][j] = Traits<Value>::lowest();
            }
        }
        max = group_combine<THREADS>(max, [](Value a, Value b) { return largest(a, b); });
        Value sum = 0;
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            if (i * THREADS + thread < CHUNKS) {
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    const Value term = scalar::exp(held[i][j] - max);
                    if constexpr (!LOG) held[i][j] = term;
                    sum += term;
                }
            }
        }
        const Value scale = scale_of(group_sum<THREADS>(sum));
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const Index at = i * THREADS + thread;
            if (is_row && at < CHUNKS) {
                Chunk chunk;
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    chunk.at[j] = narrow<Element>(LOG ? held[i][j] - max - scale : held[i][j] * scale);
                }
                y[at] = chunk;
            }
        }
    } else {
        Running state = in_runs<CHUNKS, THREADS>([&](Index first, Index end, Running& run) {
#pragma unroll 2
            for (Index at = first + thread; at < end; at += THREADS) {
                const Chunk chunk = x[at];
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) run = with(run, widen(chunk.at[j]));
            }
        });
        state = group_combine<THREADS>(state, [](Running a, Running b) { return merge(a, b); });
        const Value scale = scale_of(total(state));
        if (!is_row) return;
#pragma unroll 2
        for (Index at = thread; at < CHUNKS; at += THREADS) {
            Chunk chunk = x[at];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                chunk.at[j] = narrow<Element>(finish(widen(chunk.at[j]), state.max, scale));
            }
            y[at] = chunk;
        }
    }
}

#else

/// A thread for each line across, or `SPLITS` of them.
DEVICE void softmax_columns(const void* input, void* output) {
    const Index line = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    const bool is_line = line < LINES;
    const Index start = is_line ? line / INNER * (LENGTH * INNER) + line % INNER : 0;
    const Element* x = static_cast<const Element*>(input) + start;
    Element* y = static_cast<Element*>(output) + start;
    Running state = in_runs<LENGTH, SPLITS>([&](Index first, Index end, Running& run) {
#pragma unroll 4
        for (Index i = first + threadIdx.y; i < end; i += SPLITS) run = with(run, widen(x[i * INNER]));
    });
    if constexpr (SPLITS > 1) {
        __shared__ Running shared[SPLITS][32];
        shared[threadIdx.y][threadIdx.x] = state;
        __syncthreads();
        state = shared[0][threadIdx.x];
        for (int i = 1; i < SPLITS; ++i) state = merge(state, shared[i][threadIdx.x]);
    }
    if (!is_line) return;
    const Value scale = scale_of(total(state));
#pragma unroll 4
    for (Index i = threadIdx.y; i < LENGTH; i += SPLITS) {
        y[i * INNER] = narrow<Element>(finish(widen(x[i * INNER]), state.max, scale));
    }
}

#endif
