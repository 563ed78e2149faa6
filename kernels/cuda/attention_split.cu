// Attention of few query rows: keys are split over the warps of a cluster of blocks, and what they found is put together.
//
// The rows of a group of heads (all queries of all its heads) share its keys and values: a cluster of `BLOCKS` blocks has
// up to `ROW_TILE` of them. Each warp of it has a run of tiles of `KEY_TILE` keys, reads `STAGES` of them ahead, and ends
// with a part: largest score, sum of weights and weighted sum of values, as if there were no other keys. Parts are put
// together in the order of the keys, those of a block's warps first. Then each block finishes a share of the result from
// what all blocks sent it. No order depends on time: the same operands give the same bits.
//
// Above: attention.cuh, cluster.cuh; ROW_TILE, KEY_TILE, WARPS, STAGES; FEATURES_PADDED, FEATURE_PITCH, VALUES_PADDED,
// VALUE_PITCH; Q_IS_WIDE, K_IS_WIDE, V_IS_WIDE; ATTENTION_TENSOR_CORES; and where parts of shared memory begin, in bytes:
// ARRIVALS_AT, Q_AT, WEIGHTS_AT, RING_AT.

constexpr int THREADS = 32 * WARPS;
constexpr int PARTS = BLOCKS * WARPS;
constexpr int GROUPS = static_cast<int>(HEADS / HEADS_PER_GROUP);
constexpr int GROUP_ROWS = static_cast<int>(HEADS_PER_GROUP) * QUERIES;
constexpr int ROW_TILES = (GROUP_ROWS + ROW_TILE - 1) / ROW_TILE;
/// Rows of a tile that are kept.
constexpr int ROWS = GROUP_ROWS < ROW_TILE ? GROUP_ROWS : ROW_TILE;
constexpr int STAGE = KEY_TILE * (FEATURE_PITCH + VALUE_PITCH);
constexpr int SUM_PITCH = VALUES_PADDED + 8;
/// Elements of the result that a block finishes.
constexpr int SHARE = (ROWS * VALUES + BLOCKS - 1) / BLOCKS;

/// A row of a group; one beyond the last stands for it, and is not stored.
struct Row {
    Index head;
    int query;
};
DEVICE Row row_of(Index group, int row) {
    const int own = row < GROUP_ROWS ? row : GROUP_ROWS - 1;
    return Row{group * HEADS_PER_GROUP + own / QUERIES, own % QUERIES};
}

/// What a row sees: keys before `seen`, with the mask of the first.
struct Sight {
    int seen;
    const Mask* mask;
};
DEVICE Sight sight_of(const Mask* mask, Index batch, Row row) {
    Sight sight{visible(row.query), mask};
    if constexpr (MASK != MASK_NONE) {
        sight.mask += M_START + batch * M_BATCH + row.head * M_HEAD + static_cast<Index>(row.query) * M_ROW;
    }
    return sight;
}
template <typename T>
DEVICE T score_of(T product, const Sight& sight, int key) {
    if (key >= sight.seen) return Traits<T>::lowest();
    return adjusted<T>(product, MASK == MASK_NONE ? sight.mask : sight.mask + static_cast<Index>(key) * M_COLUMN);
}

/// What exponents are relative to: the largest score, or where nothing was seen anything that can be subtracted.
template <typename T>
DEVICE T base_of(T max) { return max == Traits<T>::lowest() ? static_cast<T>(0) : max; }

// ---- What a warp makes of its keys ---------------------------------------------------------------------------------

#if ATTENTION_TENSOR_CORES

typedef u16 Stored;

DEVICE f32 exponent(f32 x) { return exponential(x); }

constexpr int FEATURE_STEPS = FEATURES_PADDED / 16;
constexpr int VALUE_STEPS = VALUES_PADDED / 16;
constexpr int KEY_STEPS = KEY_TILE / 16;

/// A lane has two rows of the tile: `lane / 4` and that plus 8.
struct Part {
    static constexpr bool Q_IS_HELD = FEATURES_PADDED <= 128 && WARPS <= 8;

    int lane;
    const u16* q_rows;
    u32 q_held[Q_IS_HELD ? FEATURE_STEPS : 1][4];
    Sight sights[2];
    f32 sums[VALUE_STEPS * 2][4];
    f32 max[2], total[2];

    DEVICE Part(const u16* q_tile, u8*, const Mask* mask, Index batch, Index group, int first) {
        lane = static_cast<int>(threadIdx.x) % 32;
        q_rows = q_tile + lane % 16 * FEATURE_PITCH + lane / 16 * 8;
        if constexpr (Q_IS_HELD) {
#pragma unroll
            for (int i = 0; i < FEATURE_STEPS; ++i) load_matrices(q_held[i], q_rows + i * 16);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            sights[j] = sight_of(mask, batch, row_of(group, first + lane / 4 + 8 * j));
            max[j] = Traits<f32>::lowest();
            total[j] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < VALUE_STEPS * 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
        }
    }

    /// Adds the keys from `start` on; `arrived` waits for their values.
    template <typename F>
    DEVICE void add(const u16* k_tile, const u16* v_tile, int start, F arrived) {
        const u16* k_rows = k_tile + (lane % 8 + lane / 16 * 8) * FEATURE_PITCH + lane / 8 % 2 * 8;
        const u16* v_rows = v_tile + lane % 16 * VALUE_PITCH + lane / 16 * 8;
        // Sums of every other step apart: products wait less for each other.
        f32 scores[KEY_STEPS * 2][4], others[KEY_STEPS * 2][4];
#pragma unroll
        for (int i = 0; i < KEY_STEPS * 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[i][j] = others[i][j] = 0.0f;
        }
#pragma unroll
        for (int step = 0; step < FEATURE_STEPS; ++step) {
            u32 a[4];
            if constexpr (Q_IS_HELD) {
#pragma unroll
                for (int j = 0; j < 4; ++j) a[j] = q_held[step][j];
            } else {
                load_matrices(a, q_rows + step * 16);
            }
#pragma unroll
            for (int i = 0; i < KEY_STEPS; ++i) {
                u32 b[4];
                load_matrices(b, k_rows + i * 16 * FEATURE_PITCH + step * 16);
                auto& to = step % 2 == 0 ? scores : others;
                multiply(to[2 * i], a, b[0], b[1], Element());
                multiply(to[2 * i + 1], a, b[2], b[3], Element());
            }
        }
        f32 most[2] = {max[0], max[1]};
#pragma unroll
        for (int i = 0; i < KEY_STEPS * 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                scores[i][j] = score_of(scores[i][j] + others[i][j], sights[j / 2], start + i * 8 + lane % 4 * 2 + j % 2);
                most[j / 2] = fmaxf(most[j / 2], scores[i][j]);
            }
        }
        f32 base[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            most[j] = fmaxf(most[j], shuffle_xor(most[j], 1));
            most[j] = fmaxf(most[j], shuffle_xor(most[j], 2));
            base[j] = base_of(most[j]);
            const f32 factor = exponent(max[j] - base[j]);
            max[j] = most[j];
            total[j] *= factor;
#pragma unroll
            for (int i = 0; i < VALUE_STEPS * 2; ++i) {
                sums[i][2 * j] *= factor;
                sums[i][2 * j + 1] *= factor;
            }
        }
#pragma unroll
        for (int i = 0; i < KEY_STEPS * 2; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                scores[i][j] = exponent(scores[i][j] - base[j / 2]);
                total[j / 2] += scores[i][j];
            }
        }
        arrived();
#pragma unroll
        for (int step = 0; step < KEY_STEPS; ++step) {
            u32 a[4];
            a[0] = pair(scores[2 * step][0], scores[2 * step][1], Element());
            a[1] = pair(scores[2 * step][2], scores[2 * step][3], Element());
            a[2] = pair(scores[2 * step + 1][0], scores[2 * step + 1][1], Element());
            a[3] = pair(scores[2 * step + 1][2], scores[2 * step + 1][3], Element());
#pragma unroll
            for (int i = 0; i < VALUE_STEPS; ++i) {
                u32 b[4];
                load_matrices_transposed(b, v_rows + step * 16 * VALUE_PITCH + i * 16);
                multiply(sums[2 * i], a, b[0], b[1], Element());
                multiply(sums[2 * i + 1], a, b[2], b[3], Element());
            }
        }
    }

    /// Writes the sums, rows `SUM_PITCH` apart, and for each row the largest score and the sum of weights.
    DEVICE void store(f32* to, f32* beside) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            total[j] += shuffle_xor(total[j], 1);
            total[j] += shuffle_xor(total[j], 2);
            const int row = lane / 4 + 8 * j;
            if (row >= ROWS) continue;
#pragma unroll
            for (int i = 0; i < VALUE_STEPS * 2; ++i) {
                const Pack<f32, 2> two = {{sums[i][2 * j], sums[i][2 * j + 1]}};
                *reinterpret_cast<Pack<f32, 2>*>(to + row * SUM_PITCH + i * 8 + lane % 4 * 2) = two;
            }
            if (lane % 4 == 0) {
                beside[2 * row] = max[j];
                beside[2 * row + 1] = total[j];
            }
        }
    }
};

#else

typedef Element Stored;

DEVICE Value exponent(Value x) { return scalar::exp(x); }

static_assert(KEY_TILE == 16);
constexpr int COLUMNS = VALUES_PADDED / 32;
constexpr int UNIT = 16 / static_cast<int>(sizeof(Element));

/// A lane has a key of a tile and every other few features for all rows, then columns of the values.
struct Part {
    int lane;
    const Element* q_rows;
    /// By key, those of all rows.
    Value* weights;
    Sight sights[ROW_TILE];
    Value sums[ROW_TILE][COLUMNS], max[ROW_TILE], total[ROW_TILE];

    DEVICE Part(const Element* q_tile, u8* all_weights, const Mask* mask, Index batch, Index group, int first) {
        lane = static_cast<int>(threadIdx.x) % 32;
        q_rows = q_tile;
        weights = reinterpret_cast<Value*>(all_weights) + threadIdx.x / 32 * KEY_TILE * ROW_TILE;
#pragma unroll
        for (int r = 0; r < ROW_TILE; ++r) {
            sights[r] = sight_of(mask, batch, row_of(group, first + r));
            max[r] = Traits<Value>::lowest();
            total[r] = 0;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] = 0;
        }
    }

    template <typename F>
    DEVICE void add(const Element* k_tile, const Element* v_tile, int start, F arrived) {
        typedef Pack<Element, UNIT> Few;
        Value scores[ROW_TILE];
#pragma unroll
        for (int r = 0; r < ROW_TILE; ++r) scores[r] = 0;
#pragma unroll 2
        for (int feature = lane / 16 * UNIT; feature < FEATURES_PADDED; feature += 2 * UNIT) {
            const Few keys = *reinterpret_cast<const Few*>(k_tile + lane % 16 * FEATURE_PITCH + feature);
#pragma unroll
            for (int r = 0; r < ROW_TILE; ++r) {
                const Few queries = *reinterpret_cast<const Few*>(q_rows + r * FEATURE_PITCH + feature);
#pragma unroll
                for (int j = 0; j < UNIT; ++j) scores[r] += widen(queries.at[j]) * widen(keys.at[j]);
            }
        }
#pragma unroll
        for (int r = 0; r < ROW_TILE; ++r) {
            const Value product = scores[r] + shuffle_xor(scores[r], 16);
            const Value score = score_of(product, sights[r], start + lane % 16);
            const Value most = largest(max[r], group_combine<16>(score, [](Value a, Value b) { return largest(a, b); }));
            const Value base = base_of(most);
            const Value factor = exponent(max[r] - base), weight = exponent(score - base);
            max[r] = most;
            total[r] = total[r] * factor + weight;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] *= factor;
            if (lane < 16) weights[lane * ROW_TILE + r] = weight;
        }
        arrived();
#pragma unroll 2
        for (int key = 0; key < KEY_TILE; ++key) {
            Value column[COLUMNS];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) column[c] = widen(v_tile[key * VALUE_PITCH + c * 32 + lane]);
            const auto& of_rows = *reinterpret_cast<const Pack<Value, ROW_TILE>*>(weights + key * ROW_TILE);
#pragma unroll
            for (int r = 0; r < ROW_TILE; ++r) {
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) sums[r][c] += of_rows.at[r] * column[c];
            }
        }
    }

    DEVICE void store(Value* to, Value* beside) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Value sum = group_sum<16>(total[r]);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) to[r * SUM_PITCH + c * 32 + lane] = sums[r][c];
            if (lane == 0) {
                beside[2 * r] = max[r];
                beside[2 * r + 1] = sum;
            }
        }
    }
};

#endif

// ---- What is made of parts -----------------------------------------------------------------------------------------

/// Columns of a row that a thread puts together at once.
constexpr int WIDTH = VALUES % 2 == 0 && SHARE % 2 == 0 ? 2 : 1;
typedef Pack<Value, WIDTH> Columns;

struct Whole {
    Value max, total;
    Columns sums;
};
/// Of `COUNT` parts in their order: `beside` has the largest scores and sums of weights, `sums_of(part)` the sums.
template <int COUNT, typename F>
DEVICE Whole together(const Value* beside, int row, F sums_of) {
    Whole whole{Traits<Value>::lowest(), 0, {}};
#pragma unroll
    for (int part = 0; part < COUNT; ++part) whole.max = largest(whole.max, beside[(part * ROWS + row) * 2]);
    const Value base = base_of(whole.max);
#pragma unroll
    for (int part = 0; part < COUNT; ++part) {
        const Value factor = exponent(beside[(part * ROWS + row) * 2] - base);
        whole.total += factor * beside[(part * ROWS + row) * 2 + 1];
        const Columns sums = sums_of(part);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) whole.sums.at[j] += factor * sums.at[j];
    }
    return whole;
}

DEVICE void attention_split(
    const void* q_input, const void* k_input, const void* v_input, const Mask* mask_input, void* output) {
    extern __shared__ __align__(16) u8 shared[];
    // What other blocks send: for each of them sums of this block's share, then of each row what is beside them.
    Value* const sent = reinterpret_cast<Value*>(shared);
    Value* const sent_beside = sent + BLOCKS * SHARE;
    Stored* const q_tile = reinterpret_cast<Stored*>(shared + Q_AT);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    Stored* const ring = reinterpret_cast<Stored*>(shared + RING_AT) + warp * STAGES * STAGE;
    const int rank = static_cast<int>(blockIdx.x % BLOCKS);
    [[maybe_unused]] u64* const arrivals = reinterpret_cast<u64*>(shared + ARRIVALS_AT);
    if constexpr (BLOCKS > 1) {
        if (thread == 0) {
            const int left = ROWS * VALUES - rank * SHARE;
            const int own = left < 0 ? 0 : left < SHARE ? left : SHARE;
            expect(arrivals, static_cast<u32>(BLOCKS * (own + 2 * ROWS) * static_cast<int>(sizeof(Value))));
        }
        // Others send when they know that this block is ready for it.
        arrive();
    }

    const u32 unit = blockIdx.x / BLOCKS;
    const int first = static_cast<int>(unit % ROW_TILES) * ROW_TILE;
    const Index batch = unit / ROW_TILES / GROUPS, group = unit / ROW_TILES % GROUPS;
    const Stored* q = static_cast<const Stored*>(q_input) + Q_START + batch * Q_BATCH;
    const Stored* k = static_cast<const Stored*>(k_input) + K_START + batch * K_BATCH + group * K_HEAD;
    const Stored* v = static_cast<const Stored*>(v_input) + V_START + batch * V_BATCH + group * V_HEAD;

    const int limit = visible(QUERIES - 1);
    const u64 tiles = (limit + KEY_TILE - 1) / KEY_TILE;
    const int part_of_all = rank * WARPS + warp;
    const int begin = static_cast<int>(tiles * part_of_all / PARTS);
    const int end = static_cast<int>(tiles * (part_of_all + 1) / PARTS);

    {
        constexpr int UNIT_OF_Q = Q_IS_WIDE ? 16 / static_cast<int>(sizeof(Stored)) : 1;
        constexpr int UNITS = FEATURES_PADDED / UNIT_OF_Q;
        for (int i = thread; i < ROW_TILE * UNITS; i += THREADS) {
            const int column = i % UNITS * UNIT_OF_Q;
            const Row row = row_of(group, first + i / UNITS);
            const bool is_inside = column < FEATURES;
            const Index at = row.head * Q_HEAD + static_cast<Index>(row.query) * Q_ROW + column * Q_COLUMN;
            Stored* to = q_tile + i / UNITS * FEATURE_PITCH + column;
            if constexpr (Q_IS_WIDE) {
                copy_async(to, q + (is_inside ? at : 0), is_inside);
            } else {
                *to = is_inside ? q[at] : Stored();
            }
        }
        commit();
    }
    // Two groups of copies for each tile, empty beyond the last one.
    auto load = [&](int tile, int slot) {
        const int start = tile * KEY_TILE;
        Stored* to = ring + slot * STAGE;
        if (tile < end) {
            load_tile<32, KEY_TILE, FEATURES, FEATURES_PADDED, FEATURE_PITCH, K_IS_WIDE, K_ROW, K_COLUMN>(
                to, k + static_cast<Index>(start) * K_ROW, limit - start, lane);
        }
        commit();
        if (tile < end) {
            load_tile<32, KEY_TILE, VALUES, VALUES_PADDED, VALUE_PITCH, V_IS_WIDE, V_ROW, V_COLUMN>(
                to + KEY_TILE * FEATURE_PITCH, v + static_cast<Index>(start) * V_ROW, limit - start, lane);
        }
        commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES; ++i) load(begin + i, i);

    wait<2 * STAGES>();
    __syncthreads();
    Part part(q_tile, shared + WEIGHTS_AT, mask_input, batch, group, first);
    int slot = 0;
    for (int tile = begin; tile < end; ++tile) {
        const Stored* k_tile = ring + slot * STAGE;
        wait<2 * STAGES - 1>();
        __syncwarp();
        part.add(k_tile, k_tile + KEY_TILE * FEATURE_PITCH, tile * KEY_TILE, [] {
            wait<2 * STAGES - 2>();
            __syncwarp();
        });
        // Nobody reads this place any more.
        __syncwarp();
        load(tile + STAGES, slot);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }

    // Parts take the place of the tiles of all warps.
    Value* const parts = reinterpret_cast<Value*>(shared + RING_AT);
    Value* const beside = parts + WARPS * ROWS * SUM_PITCH;
    wait<0>();
    __syncthreads();
    part.store(parts + warp * ROWS * SUM_PITCH, beside + warp * ROWS * 2);
    __syncthreads();

    Element* const out = static_cast<Element*>(output) + batch * O_BATCH;
    auto finish = [&](int row_of_tile, int column, const Whole& whole) {
        if (first + row_of_tile >= GROUP_ROWS) return;
        const Row row = row_of(group, first + row_of_tile);
        const Index at = row.head * O_HEAD + static_cast<Index>(row.query) * O_ROW + column * O_COLUMN;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            const Value value = whole.total == 0 ? static_cast<Value>(0) : whole.sums.at[j] / whole.total;
            out[at + j * O_COLUMN] = narrow<Element>(value);
        }
    };
    auto sums_of = [&](int row, int column) {
        return [=](int part) {
            return *reinterpret_cast<const Columns*>(parts + (part * ROWS + row) * SUM_PITCH + column);
        };
    };
    if constexpr (BLOCKS == 1) {
        for (int i = thread * WIDTH; i < ROWS * VALUES; i += THREADS * WIDTH) {
            const int row = i / VALUES, column = i % VALUES;
            finish(row, column, together<WARPS>(beside, row, sums_of(row, column)));
        }
    } else {
        await();
        for (int i = thread * WIDTH; i < ROWS * VALUES; i += THREADS * WIDTH) {
            const int row = i / VALUES, column = i % VALUES;
            const Whole whole = together<WARPS>(beside, row, sums_of(row, column));
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                send(i / SHARE, sent + rank * SHARE + i % SHARE + j, whole.sums.at[j], arrivals);
            }
        }
        // Other threads than those that have most to do above.
        for (int i = THREADS - 1 - thread; i < ROWS * BLOCKS; i += THREADS) {
            const int row = i % ROWS;
            const Whole whole = together<WARPS>(beside, row, [](int) { return Columns(); });
            send(i / ROWS, sent_beside + (rank * ROWS + row) * 2, whole.max, arrivals);
            send(i / ROWS, sent_beside + (rank * ROWS + row) * 2 + 1, whole.total, arrivals);
        }
        // Whoever has received all that was sent here may leave: nobody writes here any more.
        receive(arrivals);
        for (int i = thread * WIDTH; i < SHARE && rank * SHARE + i < ROWS * VALUES; i += THREADS * WIDTH) {
            const int row = (rank * SHARE + i) / VALUES, column = (rank * SHARE + i) % VALUES;
            auto sent_of = [&](int part) { return *reinterpret_cast<const Columns*>(sent + part * SHARE + i); };
            finish(row, column, together<BLOCKS>(sent_beside, row, sent_of));
        }
    }
}
