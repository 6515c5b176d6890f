// The input's side of a weight gradient: one row for each (channel, tap), read at every position of the output.
#pragma once

#include "cuda/device.cuh"

namespace bsfast {

struct Range {  // what one axis of a convolution reads
  int source, target, kernel, stride, padding, dilation;
};

// Where a row reads, relative to a position's first tap without padding.
struct InputRow {
  int64 offset;
  int row, column;
};

// Row k of so many; one beyond the last is never inside the image.
BSFAST_DEVICE InputRow input_row(const Range& rows, const Range& columns, int k, int all_rows, int64 plane,
                                 int samples) {
  const int taps = rows.kernel * columns.kernel, c = k / taps, i = k % taps / columns.kernel;
  const int row = i * rows.dilation - rows.padding;
  const int column = k % columns.kernel * columns.dilation - columns.padding;
  return {c * plane + (int64(row) * columns.source + column) * samples, k < all_rows ? row : -(1 << 30), column};
}

// Reads a vector of each row at one position, zeros outside the image; returns one bit for each row: whether inside.
template <int Rows, int Samples, class T>
BSFAST_DEVICE unsigned read_rows(const T* x, const Range& rows, const Range& columns, int samples, int out_row,
                                 int out_column, const InputRow* input_rows, float (&values)[Rows][Samples]) {
  const int row = out_row * rows.stride, column = out_column * columns.stride;
  const T* from = x + (row * columns.source + column) * samples;
  unsigned inside = 0;
#pragma unroll
  for (int k = 0; k < Rows; ++k) {
    const InputRow input = input_rows[k];
    Vector<T, Samples> vector = {};
    if (unsigned(row + input.row) < unsigned(rows.source) &&
        unsigned(column + input.column) < unsigned(columns.source)) {
      vector = *reinterpret_cast<const Vector<T, Samples>*>(from + input.offset);
      inside |= 1u << k;
    }
#pragma unroll
    for (int v = 0; v < Samples; ++v) values[k][v] = to_float(vector.of[v]);
  }
  return inside;
}

}  // namespace bsfast
