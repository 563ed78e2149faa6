// Scaled dot-product attention, a tile of queries for each block, keys and values in passing (Dao et al., 2022).
//
// Above: attention.cuh; then what each of the two ways needs.

#if ATTENTION_TILES

constexpr int THREADS = 32 * WARPS;
constexpr int QUERY_TILE = 16 * WARPS;
constexpr int KEY_TILE = 64;
constexpr int TILES = (QUERIES + QUERY_TILE - 1) / QUERY_TILE;
// One more access width for each row: eight of them then lie in different banks.
constexpr int FEATURE_PITCH = FEATURES_PADDED + 8;
constexpr int VALUE_PITCH = VALUES_PADDED + 8;
constexpr int FEATURE_STEPS = FEATURES_PADDED / 16;
constexpr int VALUE_STEPS = VALUES_PADDED / 16;

DEVICE void attention_tiles(
    const void* q_input, const void* k_input, const void* v_input, const Mask* mask_input, void* output) {
    extern __shared__ __align__(16) u16 shared[];
    u16* q_tile = shared;
    u16* k_tile = q_tile + QUERY_TILE * FEATURE_PITCH;
    u16* v_tile = k_tile + KEY_TILE * FEATURE_PITCH;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Where later queries see more, the longest begin first.
    const int tile = blockIdx.x % TILES;
    const int first = (CAUSAL == CAUSAL_NONE ? tile : TILES - 1 - tile) * QUERY_TILE;
    const Index head_of_all = blockIdx.x / TILES;
    const Index batch = head_of_all / HEADS, head = head_of_all % HEADS, group = head / HEADS_PER_GROUP;
    const u16* q = static_cast<const u16*>(q_input) + Q_START + batch * Q_BATCH + head * Q_HEAD + first * Q_ROW;
    const u16* k = static_cast<const u16*>(k_input) + K_START + batch * K_BATCH + group * K_HEAD;
    const u16* v = static_cast<const u16*>(v_input) + V_START + batch * V_BATCH + group * V_HEAD;

    const int last = (first + QUERY_TILE < QUERIES ? first + QUERY_TILE : QUERIES) - 1;
    const int limit = visible(last);
    const int least = visible(first);
    const int rows[2] = {first + warp * 16 + lane / 4, first + warp * 16 + lane / 4 + 8};
    const int seen[2] = {visible(rows[0]), visible(rows[1])};
    const Mask* mask[2] = {mask_input, mask_input};
    if constexpr (MASK != MASK_NONE) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // Rows beyond the queries read the last one's mask, and are not stored.
            const Index row = rows[i] < QUERIES ? rows[i] : QUERIES - 1;
            mask[i] += M_START + batch * M_BATCH + head * M_HEAD + row * M_ROW;
        }
    }

    load_tile<THREADS, QUERY_TILE, FEATURES, FEATURES_PADDED, FEATURE_PITCH, Q_IS_WIDE, Q_ROW, Q_COLUMN>(
        q_tile, q, QUERIES - first, threadIdx.x);
    commit();
    if (limit > 0) {
        load_tile<THREADS, KEY_TILE, FEATURES, FEATURES_PADDED, FEATURE_PITCH, K_IS_WIDE, K_ROW, K_COLUMN>(
            k_tile, k, limit, threadIdx.x);
    }
    commit();

    // Where this lane points `ldmatrix`: left operands and transposed right ones, right ones.
    const int across_row = lane % 16, across_column = lane / 16 * 8;
    const int along_row = lane % 8 + lane / 16 * 8, along_column = lane / 8 % 2 * 8;
    const u16* q_rows = q_tile + (warp * 16 + across_row) * FEATURE_PITCH + across_column;

    constexpr bool Q_IS_HELD = FEATURES_PADDED <= 128;
    u32 q_held[Q_IS_HELD ? FEATURE_STEPS : 1][4];
    wait<1>();
    __syncthreads();
    if constexpr (Q_IS_HELD) {
#pragma unroll
        for (int i = 0; i < FEATURE_STEPS; ++i) load_matrices(q_held[i], q_rows + i * 16);
    }

    f32 sums[VALUE_STEPS * 2][4];
#pragma unroll
    for (int i = 0; i < VALUE_STEPS * 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
    }
    f32 max[2] = {Traits<f32>::lowest(), Traits<f32>::lowest()};
    f32 total[2] = {0.0f, 0.0f};

    for (int start = 0; start < limit; start += KEY_TILE) {
        // The keys are there, and nobody reads the values before any more.
        wait<0>();
        __syncthreads();
        load_tile<THREADS, KEY_TILE, VALUES, VALUES_PADDED, VALUE_PITCH, V_IS_WIDE, V_ROW, V_COLUMN>(
            v_tile, v + static_cast<Index>(start) * V_ROW, limit - start, threadIdx.x);
        commit();

        f32 scores[8][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[i][j] = 0.0f;
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
            for (int i = 0; i < 4; ++i) {
                u32 b[4];
                load_matrices(b, k_tile + (i * 16 + along_row) * FEATURE_PITCH + step * 16 + along_column);
                multiply(scores[2 * i], a, b[0], b[1], Element());
                multiply(scores[2 * i + 1], a, b[2], b[3], Element());
            }
        }
        __syncthreads();
        const int next = start + KEY_TILE;
        if (next < limit) {
            load_tile<THREADS, KEY_TILE, FEATURES, FEATURES_PADDED, FEATURE_PITCH, K_IS_WIDE, K_ROW, K_COLUMN>(
                k_tile, k + static_cast<Index>(next) * K_ROW, limit - next, threadIdx.x);
        }
        commit();

        const bool some_unseen = next > least;
        f32 largest_here[2] = {max[0], max[1]};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int key = start + i * 8 + lane % 4 * 2 + j % 2;
                const bool is_seen = !some_unseen || key < seen[j / 2];
                scores[i][j] = is_seen ? adjusted<f32>(scores[i][j], mask[j / 2] + key * M_COLUMN)
                                       : Traits<f32>::lowest();
                largest_here[j / 2] = fmaxf(largest_here[j / 2], scores[i][j]);
            }
        }
        f32 base[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            largest_here[j] = fmaxf(largest_here[j], shuffle_xor(largest_here[j], 1));
            largest_here[j] = fmaxf(largest_here[j], shuffle_xor(largest_here[j], 2));
            // Nothing seen yet: any base does, but for one that cannot be subtracted.
            base[j] = largest_here[j] == Traits<f32>::lowest() ? 0.0f : largest_here[j];
            const f32 factor = exponential(max[j] - base[j]);
            max[j] = largest_here[j];
            total[j] *= factor;
#pragma unroll
            for (int i = 0; i < VALUE_STEPS * 2; ++i) {
                sums[i][2 * j] *= factor;
                sums[i][2 * j + 1] *= factor;
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                scores[i][j] = exponential(scores[i][j] - base[j / 2]);
                total[j / 2] += scores[i][j];
            }
        }

        // The values are there; the next keys may still be on their way.
        wait<1>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            u32 a[4];
            a[0] = pair(scores[2 * step][0], scores[2 * step][1], Element());
            a[1] = pair(scores[2 * step][2], scores[2 * step][3], Element());
            a[2] = pair(scores[2 * step + 1][0], scores[2 * step + 1][1], Element());
            a[3] = pair(scores[2 * step + 1][2], scores[2 * step + 1][3], Element());
#pragma unroll
            for (int i = 0; i < VALUE_STEPS; ++i) {
                u32 b[4];
                load_matrices_transposed(b, v_tile + (step * 16 + across_row) * VALUE_PITCH + i * 16 + across_column);
                multiply(sums[2 * i], a, b[0], b[1], Element());
                multiply(sums[2 * i + 1], a, b[2], b[3], Element());
            }
        }
    }

    Element* out = static_cast<Element*>(output) + O_START + batch * O_BATCH + head * O_HEAD;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        total[j] += shuffle_xor(total[j], 1);
        total[j] += shuffle_xor(total[j], 2);
        const f32 factor = total[j] == 0.0f ? 0.0f : 1.0f / total[j];
        if (rows[j] >= QUERIES) continue;
        Element* to = out + static_cast<Index>(rows[j]) * O_ROW;
#pragma unroll
        for (int i = 0; i < VALUE_STEPS * 2; ++i) {
            const int column = i * 8 + lane % 4 * 2;
            const f32 low = sums[i][2 * j] * factor, high = sums[i][2 * j + 1] * factor;
            if constexpr (O_IS_PAIRED) {
                if (column < VALUES) *reinterpret_cast<u32*>(to + column) = pair(low, high, Element());
            } else {
                if (column < VALUES) to[column * O_COLUMN] = narrow<Element>(low);
                if (column + 1 < VALUES) to[(column + 1) * O_COLUMN] = narrow<Element>(high);
            }
        }
    }
}

#else

// Any type, any width: a warp for `ROWS` queries, a lane for each of 32 keys, then for each column of the values.

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int QUERY_TILE = ROWS * WARPS;
constexpr int TILES = (QUERIES + QUERY_TILE - 1) / QUERY_TILE;
constexpr int VALUE_PARTS = (VALUES + VALUE_CHUNK - 1) / VALUE_CHUNK;
// Without features, a part still brings the values.
constexpr int FEATURE_PARTS = FEATURES == 0 ? 1 : (FEATURES + FEATURE_CHUNK - 1) / FEATURE_CHUNK;
constexpr int COLUMNS = VALUE_CHUNK / 32;
// Lanes read a column of the keys: an odd pitch spreads it over the banks.
constexpr int KEY_PITCH = FEATURE_CHUNK + 1;

DEVICE void attention_lanes(
    const void* q_input, const void* k_input, const void* v_input, const Mask* mask_input, void* output) {
    extern __shared__ __align__(16) u8 shared[];
    typedef Pack<Value, 4> Four;
    Value* q_tile = reinterpret_cast<Value*>(shared);
    Value* v_tile = q_tile + QUERY_TILE * FEATURE_CHUNK;
    Value* weights = v_tile + 32 * VALUE_CHUNK;
    Value* k_tile = weights + WARPS * 32 * ROWS;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = static_cast<int>(blockIdx.x / VALUE_PARTS % TILES) * QUERY_TILE;
    const Index head_of_all = blockIdx.x / VALUE_PARTS / TILES;
    const int value_start = blockIdx.x % VALUE_PARTS * VALUE_CHUNK;
    const Index batch = head_of_all / HEADS, head = head_of_all % HEADS, group = head / HEADS_PER_GROUP;
    const Element* q = static_cast<const Element*>(q_input) + Q_START + batch * Q_BATCH + head * Q_HEAD;
    const Element* k = static_cast<const Element*>(k_input) + K_START + batch * K_BATCH + group * K_HEAD;
    const Element* v = static_cast<const Element*>(v_input) + V_START + batch * V_BATCH + group * V_HEAD;
    const Mask* mask = mask_input + (MASK == MASK_NONE ? 0 : M_START + batch * M_BATCH + head * M_HEAD);
    const int last = (first + QUERY_TILE < QUERIES ? first + QUERY_TILE : QUERIES) - 1;
    const int limit = visible(last);
    const int own = first + warp * ROWS;
    Value* own_weights = weights + warp * 32 * ROWS;

    Value max[ROWS], total[ROWS], sums[ROWS][COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        max[r] = Traits<Value>::lowest();
        total[r] = 0;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] = 0;
    }

    for (int start = 0; start < limit; start += 32) {
        Value scores[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) scores[r] = 0;
        for (int part = 0; part < FEATURE_PARTS; ++part) {
            const int feature_start = part * FEATURE_CHUNK;
            __syncthreads();
            if (FEATURE_PARTS > 1 || start == 0) {
                for (int i = threadIdx.x; i < QUERY_TILE * FEATURE_CHUNK; i += THREADS) {
                    const int row = first + i / FEATURE_CHUNK, feature = feature_start + i % FEATURE_CHUNK;
                    const bool is_inside = row < QUERIES && feature < FEATURES;
                    q_tile[i] = is_inside ? widen(q[static_cast<Index>(row) * Q_ROW + feature * Q_COLUMN]) : 0;
                }
            }
            for (int i = threadIdx.x; i < 32 * FEATURE_CHUNK; i += THREADS) {
                const int row = start + i / FEATURE_CHUNK, feature = feature_start + i % FEATURE_CHUNK;
                const bool is_inside = row < limit && feature < FEATURES;
                k_tile[i / FEATURE_CHUNK * KEY_PITCH + i % FEATURE_CHUNK] =
                    is_inside ? widen(k[static_cast<Index>(row) * K_ROW + feature * K_COLUMN]) : 0;
            }
            if (part == 0) {
                for (int i = threadIdx.x; i < 32 * VALUE_CHUNK; i += THREADS) {
                    const int row = start + i / VALUE_CHUNK, column = value_start + i % VALUE_CHUNK;
                    const bool is_inside = row < limit && column < VALUES;
                    v_tile[i] = is_inside ? widen(v[static_cast<Index>(row) * V_ROW + column * V_COLUMN]) : 0;
                }
            }
            __syncthreads();
#pragma unroll 2
            for (int feature = 0; feature < FEATURE_CHUNK; feature += 4) {
                Value keys[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) keys[j] = k_tile[lane * KEY_PITCH + feature + j];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const Four four =
                        *reinterpret_cast<const Four*>(q_tile + (warp * ROWS + r) * FEATURE_CHUNK + feature);
#pragma unroll
                    for (int j = 0; j < 4; ++j) scores[r] += four.at[j] * keys[j];
                }
            }
        }
        const int key = start + lane;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const int row = own + r;
            const bool is_seen = row < QUERIES && key < visible(row);
            const Index at = is_seen && MASK != MASK_NONE ? static_cast<Index>(row) * M_ROW + key * M_COLUMN : 0;
            const Value score =
                is_seen ? adjusted<Value>(scores[r], mask + at) : Traits<Value>::lowest();
            const Value most = largest(max[r], group_combine<32>(score, [](Value a, Value b) { return largest(a, b); }));
            // Nothing seen yet: any base does, but for one that cannot be subtracted.
            const Value base = most == Traits<Value>::lowest() ? static_cast<Value>(0) : most;
            const Value factor = scalar::exp(max[r] - base), weight = scalar::exp(score - base);
            max[r] = most;
            total[r] = total[r] * factor + weight;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] *= factor;
            own_weights[lane * ROWS + r] = weight;
        }
        __syncwarp();
        for (int i = 0; i < 32; ++i) {
            Value column[COLUMNS];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) column[c] = v_tile[i * VALUE_CHUNK + c * 32 + lane];
            const Pack<Value, ROWS>& of_rows = *reinterpret_cast<const Pack<Value, ROWS>*>(own_weights + i * ROWS);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) sums[r][c] += of_rows.at[r] * column[c];
            }
        }
        __syncwarp();
    }

    Element* out = static_cast<Element*>(output) + O_START + batch * O_BATCH + head * O_HEAD;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const Value sum = group_sum<32>(total[r]);
        const Value factor = sum == 0 ? static_cast<Value>(0) : static_cast<Value>(1) / sum;
        if (own + r >= QUERIES) continue;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const int column = value_start + c * 32 + lane;
            if (column < VALUES) {
                out[static_cast<Index>(own + r) * O_ROW + column * O_COLUMN] = narrow<Element>(sums[r][c] * factor);
            }
        }
    }
}

#endif
