// Reductions over any dimensions.
//
// Above: Index, Element, Result, KIND, LAST, OUTPUTS, LENGTH, VECTOR, kept(i), reduced(i) and, for rows, THREADS and
// ROWS_PER_BLOCK, for columns, COLUMNS and SPLITS.

enum : int { SUM, PROD, MAX, MIN, MEAN, ARG_MAX, ARG_MIN };

typedef Computed<Element> Value;

/// Arg-reductions know where the extremum is; nowhere yet.
constexpr bool IS_ARG = KIND == ARG_MAX || KIND == ARG_MIN;
constexpr Index NOWHERE = ~static_cast<Index>(0);

template <bool>
struct StateOf {
    Value value;
    DEVICE Index position() const { return NOWHERE; }
    DEVICE void place(Index) {}
};
template <>
struct StateOf<true> {
    Value value;
    Index where;
    DEVICE Index position() const { return where; }
    DEVICE void place(Index position) { where = position; }
};
typedef StateOf<IS_ARG> State;

DEVICE State identity() {
    State state;
    if constexpr (KIND == PROD) {
        state.value = static_cast<Value>(1);
    } else if constexpr (KIND == MAX) {
        state.value = Traits<Value>::lowest();
    } else if constexpr (KIND == MIN) {
        state.value = Traits<Value>::highest();
    } else {
        state.value = static_cast<Value>(0);
    }
    state.place(NOWHERE);
    return state;
}

DEVICE State of(Element x, Index position) {
    State state;
    state.value = widen(x);
    state.place(position);
    return state;
}

DEVICE State combine(State a, State b) {
    if constexpr (IS_ARG) {
        if (b.position() == NOWHERE) return a;
        if (a.position() == NOWHERE) return b;
        const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
        if (a.value == b.value || (a_is_nan && b_is_nan)) return (a.position() > b.position()) == LAST ? a : b;
        if (a_is_nan || b_is_nan) return a_is_nan ? a : b;
        return (a.value > b.value) == (KIND == ARG_MAX) ? a : b;
    } else {
        State both;
        if constexpr (KIND == SUM || KIND == MEAN) both.value = scalar::add(a.value, b.value);
        if constexpr (KIND == PROD) both.value = scalar::mul(a.value, b.value);
        if constexpr (KIND == MAX) both.value = scalar::larger(a.value, b.value);
        if constexpr (KIND == MIN) both.value = scalar::smaller(a.value, b.value);
        return both;
    }
}

// A sum of many terms of one sign drifts from the truth in `f32`: long ones are made of sums of `RUN` terms.
constexpr Index RUN = 256;
constexpr bool IS_SUM = Traits<Value>::is_float && (KIND == SUM || KIND == MEAN);

/// `over(first, end)` combines a thread's steps from `first` to `end`, every `STRIDE`-th, into `partial`.
template <Index STEPS, Index STRIDE, typename F>
DEVICE void in_runs(State (&partial)[VECTOR], F over) {
    if constexpr (IS_SUM && STEPS / STRIDE > RUN) {
        f64 totals[VECTOR];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) totals[j] = 0;
        for (Index first = 0; first < STEPS; first += STRIDE * RUN) {
            over(first, STEPS - first > STRIDE * RUN ? first + STRIDE * RUN : STEPS);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                totals[j] += static_cast<f64>(partial[j].value);
                partial[j] = identity();
            }
        }
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) partial[j].value = static_cast<Value>(totals[j]);
    } else {
        over(0, STEPS);
    }
}

/// A template, so that only what the kind needs is compiled.
template <typename R>
DEVICE R finish(State state) {
    if constexpr (IS_ARG) {
        return static_cast<R>(state.position());
    } else if constexpr (KIND == MEAN) {
        return narrow<Element>(scalar::mean(state.value, static_cast<i64>(LENGTH)));
    } else {
        return narrow<Element>(state.value);
    }
}

#if REDUCE_ROWS

/// `THREADS` threads for each result; neighbouring threads read neighbours.
DEVICE void reduce_rows(const void* input, void* output) {
    const Index row = static_cast<Index>(blockIdx.x) * ROWS_PER_BLOCK + threadIdx.x / THREADS;
    const int thread = threadIdx.x % THREADS;
    State partial[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) partial[j] = identity();
    if (row < OUTPUTS) {
        const Element* x = static_cast<const Element*>(input) + kept(row);
        in_runs<LENGTH / VECTOR, THREADS>(partial, [&](Index first, Index end) {
#pragma unroll 4
            for (Index i = first + thread; i < end; i += THREADS) {
                const auto pack = *reinterpret_cast<const Pack<Element, VECTOR>*>(x + reduced(i * VECTOR));
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) partial[j] = combine(partial[j], of(pack.at[j], i * VECTOR + j));
            }
        });
    }
    State state = partial[0];
#pragma unroll
    for (int j = 1; j < VECTOR; ++j) state = combine(state, partial[j]);
    state = group_combine<THREADS>(state, [](State a, State b) { return combine(a, b); });
    if (thread == 0 && row < OUTPUTS) static_cast<Result*>(output)[row] = finish<Result>(state);
}

#else

/// `COLUMNS` times `VECTOR` neighbouring results for each block; its rows of threads share what is reduced.
DEVICE void reduce_columns(const void* input, void* output) {
    const Index column = (static_cast<Index>(blockIdx.x) * COLUMNS + threadIdx.x) * VECTOR;
    State partial[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) partial[j] = identity();
    if (column < OUTPUTS) {
        const Element* x = static_cast<const Element*>(input) + kept(column);
        in_runs<LENGTH, SPLITS>(partial, [&](Index first, Index end) {
#pragma unroll 4
            for (Index i = first + threadIdx.y; i < end; i += SPLITS) {
                const auto pack = *reinterpret_cast<const Pack<Element, VECTOR>*>(x + reduced(i));
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) partial[j] = combine(partial[j], of(pack.at[j], i));
            }
        });
    }
    if constexpr (SPLITS > 1) {
        __shared__ State shared[SPLITS][COLUMNS];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            __syncthreads();
            shared[threadIdx.y][threadIdx.x] = partial[j];
#pragma unroll
            for (int half = SPLITS / 2; half > 0; half /= 2) {
                __syncthreads();
                if (threadIdx.y < half) {
                    partial[j] = combine(partial[j], shared[threadIdx.y + half][threadIdx.x]);
                    shared[threadIdx.y][threadIdx.x] = partial[j];
                }
            }
        }
    }
    if (threadIdx.y == 0 && column < OUTPUTS) {
        Pack<Result, VECTOR> results;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) results.at[j] = finish<Result>(partial[j]);
        *reinterpret_cast<Pack<Result, VECTOR>*>(static_cast<Result*>(output) + column) = results;
    }
}

#endif
