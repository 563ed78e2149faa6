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

// ---- The cluster -------------------------------------------------------------------------------------------------

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
        const u32 own = static_cast<u32>(__cvta_generic_to_shared(to));
#pragma unroll
        for (int rank = 0; rank < BLOCKS; ++rank) {
            u32 remote;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(own), "r"(rank));
            store_remote(remote, x);
        }
    }
}

/// Waits for all threads of the cluster, and sees what they wrote. All of them must call it equally often.
DEVICE void meet() {
    if constexpr (BLOCKS == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" : : : "memory");
    }
}

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

// ---- Steps -------------------------------------------------------------------------------------------------------

/// What the next state holds of a value.
DEVICE State to_state(Value x) {
#if RECURRENCE_TENSOR_CORES
    return narrow<Element>(x);
#else
    return round_to<Element>(x);
#endif
}
DEVICE Value from_state(State x) { return widen(x); }

DEVICE void recurrence(const void* x_input, const void* weights_input, const void* hidden_input, const void* cell_input,
                       const void* bias_input, const void* peepholes_input, const void* lengths_input,
                       void* shown_output, void* hidden_output, void* cell_output) {
    extern __shared__ __align__(16) u8 shared[];
    State* const states = reinterpret_cast<State*>(shared);
    Element* const resident = reinterpret_cast<Element*>(shared + WEIGHTS_AT);
    // Of an LSTM the cell state, of a GRU that resets early the update gate, while it waits for the other.
    Value* const cells = reinterpret_cast<Value*>(shared + CELLS_AT);
    u32* const ends = reinterpret_cast<u32*>(shared + ENDS_AT);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    Value* const sums = reinterpret_cast<Value*>(shared + SUMS_AT) + warp * WARP_SUMS;

    const u32 cluster = blockIdx.x / BLOCKS;
    const int first_unit = static_cast<int>(blockIdx.x % BLOCKS) * UNITS;
    const int direction = static_cast<int>(cluster / SAMPLE_TILES);
    const Index first_sample = static_cast<Index>(cluster % SAMPLE_TILES) * SAMPLES;
    const bool reverse = is_reverse(direction);

    const Element* const x = static_cast<const Element*>(x_input);
    [[maybe_unused]] const Element* const bias =
        static_cast<const Element*>(bias_input) + static_cast<Index>(direction) * HIDDEN;
    [[maybe_unused]] const Element* const peepholes =
        static_cast<const Element*>(peepholes_input) + static_cast<Index>(direction) * (3 * HIDDEN);
    Element* const shown = static_cast<Element*>(shown_output);
    const Element* const all = static_cast<const Element*>(weights_input);
    const Weights weights{
        all + static_cast<Index>(direction) * GATES * HIDDEN * HIDDEN, resident, first_unit};
    /// Where a unit of a sample is in a state of all.
    auto state_at = [&](int sample, int unit) {
        return (static_cast<Index>(direction) * BATCH + first_sample + sample) * HIDDEN + unit;
    };

    for (int i = thread; i < SAMPLES * STATE_PITCH; i += THREADS) {
        const int sample = i / STATE_PITCH, unit = i % STATE_PITCH;
        const bool is_inside = unit < HIDDEN && first_sample + sample < BATCH;
        Value value = 0;
        if (is_inside) value = widen(static_cast<const Element*>(hidden_input)[state_at(sample, unit)]);
        states[i] = to_state(value);
        states[SAMPLES * STATE_PITCH + i] = State();
    }
    if constexpr (RESIDENT > 0) {
        constexpr int PACKS = (RESIDENT > 0 ? RESIDENT : 1) * SPAN / VECTOR;
#pragma unroll 4
        for (int i = thread; i < GATES * UNITS * PACKS; i += THREADS) {
            const int row = i / PACKS, pack = i % PACKS;
            const Element* from = weights.row(Place{row / UNITS, row % UNITS});
            Element* to = resident + row * WEIGHT_PITCH + pack * VECTOR;
            *reinterpret_cast<Words*>(to) = load_weights(from, HELD * SPAN + pack * VECTOR);
        }
    }
    if constexpr (IS_LSTM) {
        for (int i = thread; i < SAMPLES * UNITS; i += THREADS) {
            const int sample = i / UNITS, unit = first_unit + i % UNITS;
            const bool is_inside = unit < HIDDEN && first_sample + sample < BATCH;
            Value value = 0;
            if (is_inside) value = widen(static_cast<const Element*>(cell_input)[state_at(sample, unit)]);
            cells[i] = value;
        }
    }
    for (int i = thread; i < SAMPLES; i += THREADS) {
        i64 end = STEPS;
        if constexpr (HAS_LENGTHS) {
            if (first_sample + i < BATCH) end = static_cast<const Length*>(lengths_input)[first_sample + i];
        }
        ends[i] = static_cast<u32>(end < 0 ? 0 : end > STEPS ? static_cast<i64>(STEPS) : end);
    }
    Held held[UNROLLS ? TILES : 1];
    if constexpr (HELD > 0) {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int row = 0; row < LANE_ROWS; ++row) {
                const Element* from = weights.row(place_of<0>(warp + i * WARPS, row));
#pragma unroll
                for (int chunk = 0; chunk < HELD; ++chunk) {
                    held[i][chunk][row] = load_weights(from, lane_start(chunk));
                    // Opaque from here on: not to be read again instead of being kept.
#pragma unroll
                    for (int j = 0; j < WORDS; ++j) asm volatile("" : "+r"(held[i][chunk][row].at[j]));
                }
            }
        }
    }

    /// What a lane works on in a round of a tile: a unit of a sample.
    struct Item {
        int sample;
        /// Of those of the tile, of the block, of all.
        int in_tile, in_block, unit;
        bool is_inside;
    };
    auto item_of = [&](int tile, int round) {
        const int i = round * 32 + lane;
        Item item;
        item.sample = i / TILE_UNITS;
        item.in_tile = i % TILE_UNITS;
        item.in_block = tile * TILE_UNITS + item.in_tile;
        item.unit = first_unit + item.in_block;
        item.is_inside =
            i < ITEMS && item.in_block < UNITS && item.unit < HIDDEN && first_sample + item.sample < BATCH;
        return item;
    };
    typedef Pack<Element, 1> Gates[GATES];
    auto load_x = [&](u32 time, const Item& item, Gates& to) {
        const Index row = (static_cast<Index>(time) * BATCH + first_sample + item.sample) * DIRECTIONS + direction;
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) {
            to[gate].at[0] = Element();
            if (item.is_inside) to[gate].at[0] = x[row * (GATES * HIDDEN) + gate * HIDDEN + item.unit];
        }
    };
    auto time_of = [&](u32 step) { return reverse ? static_cast<u32>(STEPS) - 1 - step : step; };
    auto runs = [&](u32 time, int sample) { return !HAS_LENGTHS || time < ends[sample]; };

    // Writes a step's states, which all threads of the block have seen.
    auto show = [&](u32 time, const State* state) {
        if (shown == nullptr) return;
        for (int i = thread; i < SAMPLES * UNITS; i += THREADS) {
            const int sample = i / UNITS, unit = first_unit + i % UNITS;
            if (unit >= HIDDEN || first_sample + sample >= BATCH) continue;
            const Index row = (static_cast<Index>(time) * DIRECTIONS + direction) * BATCH + first_sample + sample;
            const Value value = runs(time, sample) ? from_state(state[sample * STATE_PITCH + unit]) : 0;
            shown[row * HIDDEN + unit] = narrow<Element>(value);
        }
    };

    constexpr int KEPT = (AHEAD ? TILES : 1) * ROUNDS;
    Gates now[KEPT], next[KEPT];
    if constexpr (AHEAD) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            if (STEPS > 0) load_x(time_of(0), item_of(warp + i / ROUNDS * WARPS, i % ROUNDS), now[i]);
        }
    }
    // No block writes to another that has not begun, or that still fills its memory.
    meet();

    State* current = states;
    State* other = states + SAMPLES * STATE_PITCH;
#pragma unroll 1
    for (u32 step = 0; step < STEPS; ++step) {
        const u32 time = time_of(step);
        if (step > 0) show(time_of(step - 1), current);
        if constexpr (AHEAD) {
#pragma unroll
            for (int i = 0; i < KEPT; ++i) {
                if (step + 1 < STEPS) load_x(time_of(step + 1), item_of(warp + i / ROUNDS * WARPS, i % ROUNDS), next[i]);
            }
        }
        // The sum of row `gate` of those that were multiplied.
        auto sum_of = [&](int gate, const Item& item) {
            return sums[(gate * TILE_UNITS + item.in_tile) * SUM_PITCH + item.sample];
        };
        // Calls `apply(item, products of the input)` for all units and samples of this warp, after `multiply(held,
        // tile)`.
        auto each_item = [&](auto multiply, auto apply) {
#pragma unroll (UNROLLS ? TILES : 1)
            for (int i = 0; i < TILES; ++i) {
                const int tile = warp + i * WARPS;
                if constexpr (!AHEAD) {
#pragma unroll
                    for (int round = 0; round < ROUNDS; ++round) load_x(time, item_of(tile, round), now[round]);
                }
                multiply(held[UNROLLS ? i : 0], tile);
                __syncwarp();
#pragma unroll
                for (int round = 0; round < ROUNDS; ++round) {
                    const Item item = item_of(tile, round);
                    if (item.is_inside) apply(item, now[(AHEAD ? i * ROUNDS : 0) + round]);
                }
                // The next tile's sums go to the same place.
                __syncwarp();
            }
        };
#if RECURRENCE_RESETS_EARLY
        // The second phase reads nothing of the state but what it replaces: it writes in place, and the other state
        // is the one that was reset.
        auto multiply_gates = [&](const Held& held, int tile) { products<0, 2>(weights, held, tile, current, sums); };
        auto multiply_new = [&](const Held& held, int tile) { products<2, 1>(weights, held, tile, other, sums); };
        each_item(multiply_gates, [&](const Item& item, const Gates& x) {
            const Value update = gate_function(direction, sum_of(0, item) + widen(x[0].at[0]));
            const Value reset = gate_function(direction, sum_of(1, item) + widen(x[1].at[0]));
            const int at = item.sample * STATE_PITCH + item.unit;
            cells[item.sample * UNITS + item.in_block] = update;
            share(other + at, static_cast<State>(reset * from_state(current[at])));
        });
        meet();
        each_item(multiply_new, [&](const Item& item, const Gates& x) {
            const int at = item.sample * STATE_PITCH + item.unit;
            const Value update = cells[item.sample * UNITS + item.in_block];
            const Value fresh = new_function(direction, sum_of(0, item) + widen(x[2].at[0]));
            const Value old = from_state(current[at]);
            const Value state = (static_cast<Value>(1) - update) * fresh + update * old;
            if (runs(time, item.sample)) share(current + at, to_state(state));
        });
        meet();
#else
        auto multiply_all = [&](const Held& held, int tile) { products<0, GATES>(weights, held, tile, current, sums); };
        each_item(multiply_all, [&](const Item& item, const Gates& x) {
            const int at = item.sample * STATE_PITCH + item.unit;
            auto sum = [&](int gate) { return sum_of(gate, item) + widen(x[gate].at[0]); };
            State state = current[at];
            if (runs(time, item.sample)) {
                if constexpr (KIND == RNN) {
                    state = to_state(gate_function(direction, sum(0)));
                } else if constexpr (KIND == GRU) {
                    const Value update = gate_function(direction, sum(0));
                    const Value reset = gate_function(direction, sum(1));
                    Value product = sum_of(2, item);
                    if constexpr (HAS_BIAS) product += widen(bias[item.unit]);
                    const Value fresh = new_function(direction, reset * product + widen(x[2].at[0]));
                    state = to_state((static_cast<Value>(1) - update) * fresh + update * from_state(state));
                } else if constexpr (IS_LSTM) {
                    Value& cell = cells[item.sample * UNITS + item.in_block];
                    const Value old = cell;
                    // Peepholes are in the order input, output, forget.
                    auto peep = [&](int gate, Value of) {
                        if constexpr (HAS_PEEPHOLES) return widen(peepholes[gate * HIDDEN + item.unit]) * of;
                        return static_cast<Value>(0);
                    };
                    const Value input = gate_function(direction, sum(0) + peep(0, old));
                    Value forget = static_cast<Value>(1) - input;
                    if constexpr (KIND == LSTM) forget = gate_function(direction, sum(2) + peep(2, old));
                    const Value fresh = new_function(direction, sum(3));
                    const Value kept = forget * old + input * fresh;
                    const Value output = gate_function(direction, sum(1) + peep(1, kept));
                    state = to_state(output * shown_function(direction, kept));
                    cell = kept;
                }
            }
            share(other + at, state);
        });
        meet();
        State* const read = current;
        current = other;
        other = read;
#endif
        if constexpr (AHEAD) {
#pragma unroll
            for (int i = 0; i < KEPT; ++i) {
#pragma unroll
                for (int gate = 0; gate < GATES; ++gate) now[i][gate] = next[i][gate];
            }
        }
    }

    // All have met after the last write to another block: each may leave when it is done.
    if (STEPS > 0) show(time_of(static_cast<u32>(STEPS) - 1), current);
    for (int i = thread; i < SAMPLES * UNITS; i += THREADS) {
        const int sample = i / UNITS, unit = first_unit + i % UNITS;
        if (unit >= HIDDEN || first_sample + sample >= BATCH) continue;
        const Index at = state_at(sample, unit);
        if (hidden_output != nullptr) {
            static_cast<Element*>(hidden_output)[at] =
                narrow<Element>(from_state(current[sample * STATE_PITCH + unit]));
        }
        if (IS_LSTM && cell_output != nullptr) static_cast<Element*>(cell_output)[at] = narrow<Element>(cells[i]);
    }
}
