// Recurrent layers: one launch for all steps.
//
// The `BLOCKS` blocks of a cluster share a direction and `SAMPLES` samples. Each owns `UNITS` of the hidden units with
// all their gates, and has the whole hidden state of its samples in its own shared memory, twice: a step reads one and
// writes the other, of all blocks of the cluster. A barrier of the cluster ends a step. So a step reads no memory but its
// weights, of which as many as fit never move:
//
//   chunks of the hidden dimension   0 ‥ HELD            in registers
//                                    HELD ‥ + RESIDENT   in shared memory
//                                    the others          in memory, read in each step (the second-level cache)
//
// A warp owns whole units: tiles of `TILE_UNITS` units, every `WARPS`-th. It computes the products of a tile with the
// state of all samples, leaves the sums in shared memory of its own, and then a lane for each unit and sample applies the
// gates. Half types go to tensor cores, samples as columns; others are spread over the lanes along the hidden dimension
// and summed across them. Where a GRU resets early, the state as it was reset is exchanged in the middle of a step.
//
// Above: Index, Element, Length; KIND, GATES, STEPS, BATCH, DIRECTIONS, HIDDEN; HAS_BIAS, HAS_PEEPHOLES, HAS_LENGTHS;
// BLOCKS, UNITS, SAMPLES, SAMPLE_TILES, WARPS, TILES (of a warp), TILE_UNITS; RECURRENCE_TENSOR_CORES,
// RECURRENCE_RESETS_EARLY, VECTOR, CHUNKS, HELD, RESIDENT, IS_WIDE, AHEAD; STATE_PITCH, WEIGHT_PITCH, and where parts of
// shared memory begin, in bytes: WEIGHTS_AT, CELLS_AT, SUMS_AT, ENDS_AT; is_reverse(direction), gate_function(direction,
// x), new_function, shown_function.

enum : int { RNN, GRU, LSTM, LSTM_COUPLED };

typedef Computed<Element> Value;

constexpr bool IS_LSTM = KIND == LSTM || KIND == LSTM_COUPLED;
constexpr int THREADS = 32 * WARPS;
constexpr int WORDS = VECTOR * static_cast<int>(sizeof(Element)) / 4;
constexpr int ITEMS = TILE_UNITS * SAMPLES;
constexpr int ROUNDS = (ITEMS + 31) / 32;
constexpr bool UNROLLS = HELD > 0 || AHEAD;

#if RECURRENCE_TENSOR_CORES
// Rows of a tile: gate by gate, `TILE_UNITS` of each; a lane has two. A chunk is 32 elements, of which a lane has eight.
typedef Element State;
constexpr int COLUMNS = (SAMPLES + 7) / 8;
constexpr int SPAN = 32;
constexpr int LANE_ROWS = 2;
constexpr int SUM_PITCH = 8 * COLUMNS;
constexpr int WARP_SUMS = 16 * SUM_PITCH;
#else
// A lane has a part of all rows of a tile.
typedef Value State;
constexpr int SPAN = 32 * VECTOR;
constexpr int LANE_ROWS = GATES * TILE_UNITS;
constexpr int SUM_PITCH = SAMPLES;
constexpr int WARP_SUMS = LANE_ROWS * SUM_PITCH;
#endif

/// Neighbouring weights of a row, as registers hold them.
typedef Pack<u32, WORDS> Words;

union Bits {
    Words words;
    Pack<Element, VECTOR> pack;
    DEVICE Bits() {}
};

// ---- Weights -----------------------------------------------------------------------------------------------------

struct Place {
    int gate;
    /// Of those of the block.
    int unit;
};

/// Row `i` of those of a lane, of gates from `FIRST` on. Tiles may end with units and gates that nobody has: their sums
/// are not read, and the weights of neighbours stand for theirs.
template <int FIRST>
DEVICE Place place_of(int tile, int i) {
#if RECURRENCE_TENSOR_CORES
    i = 8 * i + static_cast<int>(threadIdx.x) % 32 / 4;
#endif
    const int gate = FIRST + i / TILE_UNITS, unit = tile * TILE_UNITS + i % TILE_UNITS;
    return Place{gate < GATES ? gate : GATES - 1, unit < UNITS ? unit : UNITS - 1};
}

/// Where this lane's elements of a chunk are.
DEVICE int lane_start(int chunk) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#if RECURRENCE_TENSOR_CORES
    return chunk * SPAN + lane % 4 * VECTOR;
#else
    return chunk * SPAN + lane * VECTOR;
#endif
}

/// Elements of a row from `k` on, zeros beyond its end.
DEVICE Words load_weights(const Element* row, int k) {
    Bits bits;
    if constexpr (HIDDEN % SPAN == 0) {
        bits.words = *reinterpret_cast<const Words*>(row + k);
    } else if constexpr (IS_WIDE) {
#pragma unroll
        for (int j = 0; j < WORDS; ++j) bits.words.at[j] = 0;
        if (k < HIDDEN) bits.words = *reinterpret_cast<const Words*>(row + k);
    } else {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) bits.pack.at[j] = k + j < HIDDEN ? row[k + j] : Element();
    }
    return bits.words;
}

/// The weights of a direction as a block sees them.
struct Weights {
    /// All rows, in memory.
    const Element* all;
    /// Resident chunks of the block's own rows, `UNITS` of each gate.
    const Element* resident;
    int first_unit;

    DEVICE const Element* row(Place place) const {
        const int unit = first_unit + place.unit < HIDDEN ? first_unit + place.unit : HIDDEN - 1;
        return all + static_cast<Index>(place.gate * HIDDEN + unit) * HIDDEN;
    }
    DEVICE const Element* resident_row(Place place) const {
        return resident + (place.gate * UNITS + place.unit) * WEIGHT_PITCH;
    }
};

typedef Words Held[HELD > 0 ? HELD : 1][LANE_ROWS];

/// The number, which the compiler does not know: a loop to it stays one. Written out, loops over many chunks need more
/// registers for what they load than there are, and the compiler writes them out whatever it is asked.
DEVICE int opaque(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

/// Whether a chunk's number is even, as a type: which sums it goes to.
struct Even {
    static constexpr int SET = 0;
};
struct Odd {
    static constexpr int SET = 2;
};

/// Calls `accumulate(parity, start, at)` for each chunk: `at(i)` are this lane's weights of its row `i`, from element
/// `start` on.
template <int FIRST, int ROWS, typename F>
DEVICE void each_chunk(const Weights& weights, const Held& held, int tile, F accumulate) {
    constexpr int HELD_FROM = RECURRENCE_TENSOR_CORES ? 0 : FIRST * TILE_UNITS;
    if constexpr (HELD > 0) {
#pragma unroll
        for (int chunk = 0; chunk < HELD; ++chunk) {
            auto at = [&](int i) { return held[chunk][HELD_FROM + i]; };
            if (chunk % 2 == 0) accumulate(Even(), lane_start(chunk), at);
            else accumulate(Odd(), lane_start(chunk), at);
        }
    }
    // Two chunks at once on tensor cores, whose products take long; otherwise a lane loads enough in one.
    constexpr int STEP = RECURRENCE_TENSOR_CORES ? 2 : 1;
    if constexpr (RESIDENT > 0) {
        auto resident = [&](auto parity, int chunk) {
            auto at = [&](int i) {
                const Element* row = weights.resident_row(place_of<FIRST>(tile, i));
                return *reinterpret_cast<const Words*>(row + lane_start(chunk - HELD));
            };
            accumulate(parity, lane_start(chunk), at);
        };
        const int end = opaque(HELD + RESIDENT / STEP * STEP);
#pragma unroll 1
        for (int chunk = HELD; chunk < end; chunk += STEP) {
            resident(Even(), chunk);
            if constexpr (STEP == 2) resident(Odd(), chunk + 1);
        }
        if constexpr (RESIDENT % STEP == 1) resident(Even(), HELD + RESIDENT - 1);
    }
    constexpr int OTHERS = CHUNKS - HELD - RESIDENT;
    if constexpr (OTHERS > 0) {
        const Element* rows[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) rows[i] = weights.row(place_of<FIRST>(tile, i));
        auto other = [&](auto parity, int chunk) {
            auto at = [&](int i) { return load_weights(rows[i], lane_start(chunk)); };
            accumulate(parity, lane_start(chunk), at);
        };
        const int end = opaque(CHUNKS - OTHERS % STEP);
#pragma unroll 1
        for (int chunk = HELD + RESIDENT; chunk < end; chunk += STEP) {
            other(Even(), chunk);
            if constexpr (STEP == 2) other(Odd(), chunk + 1);
        }
        if constexpr (OTHERS % STEP == 1) other(Even(), CHUNKS - 1);
    }
}

// ---- Products ----------------------------------------------------------------------------------------------------

#if RECURRENCE_TENSOR_CORES

// Fragments as the PTX manual lays them out for mma.m16n8k16: a thread holds rows `lane / 4` and that plus 8, columns
// `lane % 4 * 2` and the one after it. Which element of the state meets which column of the fragment is free as long as
// it is the same for both operands: a lane's are eight neighbours, for two products.

DEVICE void multiply(f32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void multiply(f32 (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// Sums of a tile: `to[row * SUM_PITCH + sample]`. All lanes of the warp must call it.
template <int FIRST, int COUNT>
DEVICE void products(const Weights& weights, const Held& held, int tile, const State* state, Value* to) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    // Four sums, so that not every product waits for the one before.
    f32 sums[4][COLUMNS][4] = {};
    each_chunk<FIRST, LANE_ROWS>(weights, held, tile, [&](auto parity, int start, auto at) {
        constexpr int SET = decltype(parity)::SET;
        const Words upper = at(0), lower = at(1);
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            const int sample = 8 * column + lane / 4;
            Words b;
            if (SAMPLES % 8 == 0 || sample < SAMPLES) {
                b = *reinterpret_cast<const Words*>(state + sample * STATE_PITCH + start);
            } else {
                b.at[0] = b.at[1] = b.at[2] = b.at[3] = 0;
            }
            f32(&first)[4] = sums[SET][column];
            f32(&second)[4] = sums[SET + 1][column];
            multiply(first, upper.at[0], lower.at[0], upper.at[1], lower.at[1], b.at[0], b.at[1], Element());
            multiply(second, upper.at[2], lower.at[2], upper.at[3], lower.at[3], b.at[2], b.at[3], Element());
        }
    });
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const f32 sum = (sums[0][column][i] + sums[1][column][i]) + (sums[2][column][i] + sums[3][column][i]);
            to[(lane / 4 + i / 2 * 8) * SUM_PITCH + 8 * column + lane % 4 * 2 + i % 2] = sum;
        }
    }
}

#else

/// The power of two from `count` on.
constexpr int whole(int count) {
    int power = 1;
    while (power < count) power *= 2;
    return power;
}

/// Sums of a tile: `to[row * SUM_PITCH + sample]`. All lanes of the warp must call it.
template <int FIRST, int COUNT>
DEVICE void products(const Weights& weights, const Held& held, int tile, const State* state, Value* to) {
    constexpr int ROWS = COUNT * TILE_UNITS;
    constexpr int ALL = whole(ROWS * SAMPLES);
    static_assert(ALL <= 32, "a lane ends with one sum at most");
    typedef Pack<State, VECTOR> States;
    Value sums[ALL] = {};
    each_chunk<FIRST, ROWS>(weights, held, tile, [&](auto, int start, auto at) {
        States states[SAMPLES];
#pragma unroll
        for (int sample = 0; sample < SAMPLES; ++sample) {
            states[sample] = *reinterpret_cast<const States*>(state + sample * STATE_PITCH + start);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            Bits bits;
            bits.words = at(i);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const Value weight = widen(bits.pack.at[j]);
#pragma unroll
                for (int sample = 0; sample < SAMPLES; ++sample) {
                    sums[i * SAMPLES + sample] += weight * states[sample].at[j];
                }
            }
        }
    });
    // Each exchange halves what a lane sums: one half of them it leaves to the other lane, for the other half it takes
    // that lane's. At the end lanes `32 / ALL * i` and on have sum `i`.
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int mask = 16, width = ALL / 2; mask > 0; mask /= 2, width /= 2) {
        if (width == 0) {
            sums[0] += shuffle_xor(sums[0], mask);
            continue;
        }
        const bool is_upper = (lane & mask) != 0;
#pragma unroll
        for (int i = 0; i < width; ++i) {
            const Value given = is_upper ? sums[i] : sums[i + width];
            const Value kept = is_upper ? sums[i + width] : sums[i];
            sums[i] = kept + shuffle_xor(given, mask);
        }
    }
    constexpr int SAME = 32 / ALL;
    if (lane % SAME == 0 && lane / SAME < ROWS * SAMPLES) to[lane / SAME] = sums[0];
}

#endif
