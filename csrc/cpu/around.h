// What a convolution does with its source as it reads it, and with its result before it stores it.
#pragma once

#include <cstdint>

namespace bsfast {

// Reads act(scale x + shift) instead of x, with the coefficients of each source channel of each branch; zeros around
// the image stay zeros. Without a scale, reads x.
template <class T>
struct Prologue {
  const T* scale = nullptr;  // [M, channels]
  const T* shift = nullptr;
  bool relu = false;
};

// Of the elements of a channel in one slice of the result: a target row of one chunk of samples of one image.
struct Moments {
  double count, mean, square;  // square: sum of squared deviations from the mean
};

// Stores act(scale y + bias + residual) instead of y, zeros where the mask is at most 0, and describes what it
// stored.
template <class T>
struct Epilogue {
  const T* scale = nullptr;     // [M, channels] or null
  const T* bias = nullptr;      // [M, channels] or null
  const T* residual = nullptr;  // as the result, or null
  bool relu = false;
  const T* mask = nullptr;     // as the result, or null: the values of a ReLU whose derivative it is multiplied by
  Moments* moments = nullptr;  // [image, group, slice, channel of the group] or null
};

}  // namespace bsfast
