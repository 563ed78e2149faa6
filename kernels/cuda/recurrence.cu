// The steps of a recurrent layer, and what comes before and after them; `recurrence.cuh` says how work is divided.

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
