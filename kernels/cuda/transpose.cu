// Transpositions: a tile goes through shared memory where the innermost dimension changes, packs are copied where it
// does not.
//
// Above: Index, Element (as wide as the type, or a pack of neighbours), COUNT and source(i) for packs; for tiles, TILE,
// ROWS and COLUMNS (extents of the dimensions that are innermost in the operand and in the result), ROW_TILES,
// COLUMN_TILES, FROM_COLUMN and TO_ROW (strides of the other one), from_batch(i) and to_batch(i).

#if TRANSPOSE_TILES

constexpr int THREADS = 256;
constexpr int STEP = THREADS / TILE;
// One more bank for each row, so that a column lies in different ones.
constexpr int PITCH = TILE + (sizeof(Element) < 4 ? 4 / sizeof(Element) : 1);

DEVICE void transpose_tiles(const void* input, void* output) {
    __shared__ Element tile[TILE][PITCH];
    const Index row_tile = blockIdx.x % ROW_TILES, rest = blockIdx.x / ROW_TILES;
    const Index column_tile = rest % COLUMN_TILES, batch = rest / COLUMN_TILES;
    const Element* x = static_cast<const Element*>(input) + from_batch(batch);
    Element* y = static_cast<Element*>(output) + to_batch(batch);
    const int across = threadIdx.x % TILE, down = threadIdx.x / TILE;
    const Index first_row = row_tile * TILE, first_column = column_tile * TILE;
    const Index from_row = first_row + across;
#pragma unroll
    for (int i = 0; i < TILE; i += STEP) {
        const Index column = first_column + down + i;
        if (from_row < ROWS && column < COLUMNS) tile[down + i][across] = x[column * FROM_COLUMN + from_row];
    }
    __syncthreads();
    const Index to_column = first_column + across;
#pragma unroll
    for (int i = 0; i < TILE; i += STEP) {
        const Index row = first_row + down + i;
        if (row < ROWS && to_column < COLUMNS) y[row * TO_ROW + to_column] = tile[across][down + i];
    }
}

#else

DEVICE void transpose_packs(const void* input, void* output) {
    const Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < COUNT) static_cast<Element*>(output)[i] = static_cast<const Element*>(input)[source(i)];
}

#endif
