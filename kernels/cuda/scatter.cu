// Scatters. The operand is seen as lines of targets; a block holds a part of some neighbouring lines, goes through all
// their updates in order, and writes the part. Each target belongs to one thread, so that nothing races and the order
// of updates is that of their positions.
//
// Above: Index, Element, Where (type of indices), COMBINE, TARGETS, INNER, UPDATES, PARTS, PART, COLUMNS, COLUMN_TILES,
// OWNERS, TARGET_COLUMNS, update_of(outer, column, any): where the updates of a line begin, UPDATE_STRIDE, and
// target_of(indices, start, j): the target of update `j`, negative if outside: such an update is reported and left out.

enum : int { ASSIGN, SUM, PROD, MAX, MIN };
constexpr int THREADS = COLUMNS * OWNERS;
constexpr int CHUNK = 1024 / TARGET_COLUMNS;

// Assigned elements keep their bits; combined ones are computed with, and rounded once.
template <bool IS_ASSIGNED>
struct HeldOf {
    typedef Element Type;
    static DEVICE Type in(Element x) { return x; }
    static DEVICE Element out(Type x) { return x; }
};
template <>
struct HeldOf<false> {
    typedef Computed<Element> Type;
    static DEVICE Type in(Element x) { return widen(x); }
    static DEVICE Element out(Type x) { return narrow<Element>(x); }
};
typedef HeldOf<COMBINE == ASSIGN> Held;

DEVICE Held::Type combine(Held::Type old, Held::Type update) {
    if constexpr (COMBINE == SUM) return scalar::add(old, update);
    if constexpr (COMBINE == PROD) return scalar::mul(old, update);
    if constexpr (COMBINE == MAX) return scalar::larger(old, update);
    if constexpr (COMBINE == MIN) return scalar::smaller(old, update);
    return update;
}

DEVICE void scatter(const void* input, const void* index_input, const void* update_input, void* output,
                    u32* fault) {
    __shared__ Held::Type held[PART * COLUMNS];
    __shared__ int targets[CHUNK * TARGET_COLUMNS];
    const Index part = blockIdx.x % PARTS, rest = blockIdx.x / PARTS;
    const Index first_column = rest % COLUMN_TILES * COLUMNS, outer = rest / COLUMN_TILES;
    const Index first = part * PART;
    const int across = threadIdx.x % COLUMNS, owner = threadIdx.x / COLUMNS;
    const Index column = first_column + across;
    const bool is_column = column < INNER;
    const Element* x = static_cast<const Element*>(input) + (outer * TARGETS + first) * INNER + column;
    Element* y = static_cast<Element*>(output) + (outer * TARGETS + first) * INNER + column;
    const Where* indices = static_cast<const Where*>(index_input);
    const int count = static_cast<int>(TARGETS - first < PART ? TARGETS - first : PART);

    if (is_column) {
        for (int i = owner; i < count; i += OWNERS) held[i * COLUMNS + across] = Held::in(x[i * INNER]);
    }
    bool any = false;
    const Index updates_start = update_of(outer, column, any);
    const Element* updates = static_cast<const Element*>(update_input) + (is_column && any ? updates_start : 0);

    for (Index start = 0; start < UPDATES; start += CHUNK) {
        __syncthreads();
        for (int i = threadIdx.x; i < CHUNK * TARGET_COLUMNS; i += THREADS) {
            const Index j = start + i / TARGET_COLUMNS;
            const Index own_column = first_column + i % TARGET_COLUMNS;
            int target = -1;
            bool has_updates = false;
            const Index line = update_of(outer, own_column, has_updates);
            if (j < UPDATES && own_column < INNER && has_updates) {
                const i64 whole = target_of(indices, line, j);
                if (whole < 0) *fault = 1;
                const i64 position = whole - static_cast<i64>(first);
                if (position >= 0 && position < count) target = static_cast<int>(position);
            }
            targets[i] = target;
        }
        __syncthreads();
        const int here = static_cast<int>(UPDATES - start < CHUNK ? UPDATES - start : CHUNK);
        if (is_column) {
            for (int i = 0; i < here; ++i) {
                const int target = targets[i * TARGET_COLUMNS + (TARGET_COLUMNS == 1 ? 0 : across)];
                if (target >= 0 && target % OWNERS == owner) {
                    Held::Type& slot = held[target * COLUMNS + across];
                    slot = combine(slot, Held::in(updates[(start + i) * UPDATE_STRIDE]));
                }
            }
        }
    }
    if (is_column) {
        for (int i = owner; i < count; i += OWNERS) y[i * INNER] = Held::out(held[i * COLUMNS + across]);
    }
}
