// Layer and root-mean-square normalisation of rows.
//
// Above: Index, Element, Scale, Bias, IS_LAYER, HAS_SCALE, HAS_BIAS, EPSILON, LINES, LENGTH, those of a row, HELD,
// scale_at(i), bias_at(i), SCALE_IS_PACKED, BIAS_IS_PACKED.

typedef Computed<Element> Value;

DEVICE Value sum_over_row(Value x) { return group_sum<THREADS>(x); }

/// The operand's elements beside elements `i` and on of a row.
template <bool IS_PACKED, typename T, typename F>
DEVICE void load_beside(const T* from, Index i, F at, Value (&to)[VECTOR]) {
    if constexpr (IS_PACKED) {
        const Pack<T, VECTOR> pack = *reinterpret_cast<const Pack<T, VECTOR>*>(from + i);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) to[j] = widen(pack.at[j]);
    } else {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) to[j] = widen(from[at(i + j)]);
    }
}

/// Writes elements `i` and on of a row.
DEVICE void store(
    Element* y, Index i, const Value (&x)[VECTOR], Value mean, Value factor, const Scale* scale, const Bias* bias) {
    Value scales[VECTOR], biases[VECTOR];
    if constexpr (HAS_SCALE) load_beside<SCALE_IS_PACKED>(scale, i, [](Index at) { return scale_at(at); }, scales);
    if constexpr (HAS_BIAS) load_beside<BIAS_IS_PACKED>(bias, i, [](Index at) { return bias_at(at); }, biases);
    Pack<Element, VECTOR> pack;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        Value value = (x[j] - mean) * factor;
        if constexpr (HAS_SCALE) value *= scales[j];
        if constexpr (HAS_BIAS) value += biases[j];
        pack.at[j] = narrow<Element>(value);
    }
    *reinterpret_cast<Pack<Element, VECTOR>*>(y + i) = pack;
}

DEVICE void norm_rows(const void* input, const void* scale_input, const void* bias_input, void* output) {
    typedef Pack<Element, VECTOR> Chunk;
    constexpr Index CHUNKS = LENGTH / VECTOR;
    constexpr Value COUNT = static_cast<Value>(LENGTH);
    const Scale* scale = static_cast<const Scale*>(scale_input);
    const Bias* bias = static_cast<const Bias*>(bias_input);
    const Index row = static_cast<Index>(blockIdx.x) * ROWS_PER_BLOCK + threadIdx.x / THREADS;
    const Index thread = threadIdx.x % THREADS;
    const bool is_row = row < LINES;
    const Element* x = static_cast<const Element*>(input) + (is_row ? row : 0) * LENGTH;
    Element* y = static_cast<Element*>(output) + (is_row ? row : 0) * LENGTH;
    constexpr int HOLDS = HELD ? PACKS : 1;
    Value held[HOLDS][VECTOR];
    // Layer normalisation does not change when all elements move by as much. Relative to the first, those of a row of
    // equals are exactly 0, and those near each other keep what tells them apart.
    const Value origin = IS_LAYER ? widen(x[0]) : static_cast<Value>(0);
    auto moved = [&](Element x) {
        if constexpr (IS_LAYER) return widen(x) - origin;
        return widen(x);
    };

    // The sum of a term of each of this thread's elements: in registers, or read anew. A sum of many terms of one sign
    // drifts from the truth: it is made of sums of `RUN` packs.
    auto sum_of = [&](auto term) {
        if constexpr (HELD) {
            Value sum = 0;
#pragma unroll
            for (int i = 0; i < PACKS; ++i) {
                if (i * THREADS + thread < CHUNKS) {
#pragma unroll
                    for (int j = 0; j < VECTOR; ++j) sum += term(held[i][j]);
                }
            }
            return sum;
        } else {
            constexpr Index RUN = 256 / VECTOR * THREADS;
            f64 total = 0;
            for (Index first = 0; first < CHUNKS; first += RUN) {
                const Index end = CHUNKS - first > RUN ? first + RUN : CHUNKS;
                Value sum = 0;
#pragma unroll 2
                for (Index at = first + thread; at < end; at += THREADS) {
                    const Chunk chunk = reinterpret_cast<const Chunk*>(x)[at];
#pragma unroll
                    for (int j = 0; j < VECTOR; ++j) sum += term(moved(chunk.at[j]));
                }
                total += static_cast<f64>(sum);
            }
            return static_cast<Value>(total);
        }
    };

    if constexpr (HELD) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const Index at = i * THREADS + thread;
            if (at < CHUNKS) {
                const Chunk chunk = reinterpret_cast<const Chunk*>(x)[at];
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) held[i][j] = moved(chunk.at[j]);
            }
        }
    }
    Value mean = 0;
    if constexpr (IS_LAYER) mean = sum_over_row(sum_of([](Value x) { return x; })) / COUNT;
    const Value squares = sum_of([&](Value x) { return (x - mean) * (x - mean); });
    const Value variance = sum_over_row(squares) / COUNT;
    const Value factor = static_cast<Value>(1) / scalar::sqrt(variance + static_cast<Value>(EPSILON));
    if (!is_row) return;
    if constexpr (HELD) {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const Index at = i * THREADS + thread;
            if (at < CHUNKS) store(y, at * VECTOR, held[i], mean, factor, scale, bias);
        }
    } else {
        for (Index at = thread; at < CHUNKS; at += THREADS) {
            const Chunk chunk = reinterpret_cast<const Chunk*>(x)[at];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) held[0][j] = moved(chunk.at[j]);
            store(y, at * VECTOR, held[0], mean, factor, scale, bias);
        }
    }
}
