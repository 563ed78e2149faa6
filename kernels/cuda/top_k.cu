// The largest or smallest elements along an axis, equal ones by lower index first.
//
// An element becomes an entry: a number that orders like it, then its index. Entries are all different, so that any
// way to sort them gives the same order. The smallest entries win.
//
// Above: Index, Element, LARGEST, WINNERS (k), LINES, LENGTH, INNER, THREADS; RUN for what sorts, LINES_PER_BLOCK for
// short lines, BEST for filters, BLOCKS_PER_LINE for ranks.

typedef Computed<Element> Value;

DEVICE u32 ordered(f32 x) {
    if (x != x) return ~0u;
    // Both zeros are one number.
    const u32 bits = x == 0.0f ? 0u : __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE u64 ordered(f64 x) {
    if (x != x) return ~0ull;
    const u64 bits = x == 0.0 ? 0ull : static_cast<u64>(__double_as_longlong(x));
    return bits >> 63 ? ~bits : bits | (1ull << 63);
}
DEVICE u64 ordered(u64 x) { return x; }
DEVICE u64 ordered(i64 x) { return static_cast<u64>(x) ^ (1ull << 63); }
DEVICE u32 ordered(u32 x) { return x; }
DEVICE u32 ordered(u16 x) { return x; }
DEVICE u32 ordered(u8 x) { return x; }
DEVICE u32 ordered(i32 x) { return static_cast<u32>(x) ^ 0x80000000u; }
DEVICE u32 ordered(i16 x) { return ordered(static_cast<i32>(x)); }
DEVICE u32 ordered(i8 x) { return ordered(static_cast<i32>(x)); }

/// Of numbers of up to 32 bits.
template <bool IS_WIDE>
struct EntryOf {
    u64 both;
    static DEVICE EntryOf none() { return EntryOf{~0ull}; }
    static DEVICE EntryOf of(u32 number, Index index) { return EntryOf{static_cast<u64>(number) << 32 | index}; }
    DEVICE bool operator<(EntryOf other) const { return both < other.both; }
    DEVICE Index index() const { return static_cast<Index>(both & 0xffffffffull); }
};
template <>
struct EntryOf<true> {
    u64 number;
    u64 position;
    static DEVICE EntryOf none() { return EntryOf{~0ull, ~0ull}; }
    static DEVICE EntryOf of(u64 number, Index index) { return EntryOf{number, index}; }
    DEVICE bool operator<(EntryOf other) const {
        return number < other.number || (number == other.number && position < other.position);
    }
    DEVICE Index index() const { return static_cast<Index>(position); }
};
typedef EntryOf<sizeof(Value) == 8> Entry;

DEVICE Entry entry(const Element* x, Index position) {
    const auto number = ordered(widen(x[position * INNER]));
    return Entry::of(LARGEST ? ~number : number, position);
}

DEVICE const Element* line_of(const void* input, Index line) {
    return static_cast<const Element*>(input) + line / INNER * (LENGTH * INNER) + line % INNER;
}

DEVICE void store(void* values, void* indices, const Element* x, Index line, Index place, Entry winner) {
    const Index at = line / INNER * (WINNERS * INNER) + line % INNER + place * INNER;
    if (values) static_cast<Element*>(values)[at] = x[winner.index() * INNER];
    if (indices) static_cast<i64*>(indices)[at] = winner.index();
}

#if TOP_K_SORTS || TOP_K_FILTERS

/// Sorts each run of `RUN` entries, a power of two, of `COUNT` in all.
template <int RUN, int COUNT>
DEVICE void sort(Entry* entries) {
    for (int size = 2; size <= RUN; size *= 2) {
        for (int distance = size / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < COUNT / 2; i += THREADS) {
                const int low = i / distance * (2 * distance) + i % distance;
                const int high = low + distance;
                // The last merge, and every other one before, is ascending.
                const bool is_ascending = size == RUN || (low & size) == 0;
                const Entry a = entries[low], b = entries[high];
                if ((b < a) == is_ascending) {
                    entries[low] = b;
                    entries[high] = a;
                }
            }
        }
    }
    __syncthreads();
}

extern __shared__ __align__(16) u8 shared[];

#endif

#if TOP_K_SORTS

/// Lines short enough to be sorted in shared memory, several for each block.
DEVICE void top_k_sort(const void* input, void* values, void* indices) {
    Entry* entries = reinterpret_cast<Entry*>(shared);
    const Index first = static_cast<Index>(blockIdx.x) * LINES_PER_BLOCK;
    for (int i = threadIdx.x; i < LINES_PER_BLOCK * RUN; i += THREADS) {
        const Index line = first + i / RUN, position = i % RUN;
        entries[i] = line < LINES && position < LENGTH ? entry(line_of(input, line), position) : Entry::none();
    }
    sort<RUN, LINES_PER_BLOCK * RUN>(entries);
    for (Index i = threadIdx.x; i < LINES_PER_BLOCK * WINNERS; i += THREADS) {
        const Index line = first + i / WINNERS, place = i % WINNERS;
        if (line < LINES) {
            store(values, indices, line_of(input, line), line, place, entries[i / WINNERS * RUN + place]);
        }
    }
}

#elif TOP_K_FILTERS

/// Long lines: the best so far stand first, better ones gather behind them until there is no room for more.
DEVICE void top_k_filter(const void* input, void* values, void* indices) {
    constexpr int EACH = 4;
    constexpr int ROOM = RUN - BEST;
    static_assert(ROOM >= THREADS * EACH, "a step's candidates fit");
    __shared__ int gathered;
    Entry* entries = reinterpret_cast<Entry*>(shared);
    const Element* x = line_of(input, blockIdx.x);
    for (int i = threadIdx.x; i < BEST; i += THREADS) entries[i] = Entry::none();
    if (threadIdx.x == 0) gathered = 0;
    Entry worst = Entry::none();
    __syncthreads();
    for (Index start = 0; start < LENGTH; start += THREADS * EACH) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const Index position = start + i * THREADS + threadIdx.x;
            if (position < LENGTH) {
                const Entry candidate = entry(x, position);
                // Their order here is any: they are sorted before they count.
                if (candidate < worst) entries[BEST + atomicAdd(&gathered, 1)] = candidate;
            }
        }
        __syncthreads();
        const int count = gathered;
        const bool is_last = start + THREADS * EACH >= LENGTH;
        if (count + THREADS * EACH > ROOM || is_last) {
            for (int i = BEST + count + threadIdx.x; i < RUN; i += THREADS) entries[i] = Entry::none();
            sort<RUN, RUN>(entries);
            worst = entries[WINNERS - 1];
            if (threadIdx.x == 0) gathered = 0;
        }
        __syncthreads();
    }
    for (Index place = threadIdx.x; place < WINNERS; place += THREADS) {
        store(values, indices, x, blockIdx.x, place, entries[place]);
    }
}

#else

/// Long lines of which much is wanted: an element's place is the number of better ones.
DEVICE void top_k_rank(const void* input, void* values, void* indices) {
    __shared__ Entry others[THREADS];
    const Index line = blockIdx.x / BLOCKS_PER_LINE;
    const Index position = blockIdx.x % BLOCKS_PER_LINE * THREADS + threadIdx.x;
    const Element* x = line_of(input, line);
    const Entry own = position < LENGTH ? entry(x, position) : Entry::none();
    Index place = 0;
    for (Index start = 0; start < LENGTH; start += THREADS) {
        __syncthreads();
        others[threadIdx.x] = start + threadIdx.x < LENGTH ? entry(x, start + threadIdx.x) : Entry::none();
        __syncthreads();
#pragma unroll 8
        for (int i = 0; i < THREADS; ++i) place += others[i] < own;
    }
    if (position < LENGTH && place < WINNERS) store(values, indices, x, line, place, own);
}

#endif
