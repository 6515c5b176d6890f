// The emulation itself: what it computes, and the faults it must find. With an argument it runs one access out of
// bounds, which the address sanitizer must stop.
#include <cmath>
#include <random>
#include <vector>

#include "emulation/cuda.h"
#include "expect.h"

namespace {

using namespace bsfast::emulation;
using namespace bsfast::test;

constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::random};

// to[i] = from[n - 1 - i] for the block's n elements, through shared memory.
__global__ void reverse_block(const int* from, int* to, bool barrier) {
  int* shared = bsfast::shared_memory<int>();
  const unsigned i = threadIdx.x, first = blockIdx.x * blockDim.x;
  shared[i] = from[first + i];
  if (barrier) __syncthreads();
  to[first + i] = shared[blockDim.x - 1 - i];
}

// Adds up a warp's lanes in each of its rounds; without the second barrier the next round overwrites what is read.
__global__ void rounds(const int* from, int* to, bool second_barrier) {
  int* shared = bsfast::shared_memory<int>();
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    shared[threadIdx.x] = from[threadIdx.x] * (round + 1);
    __syncwarp();
    sum += shared[31 - threadIdx.x];
    if (second_barrier) __syncwarp();
  }
  to[threadIdx.x] = sum;
}

bool agrees(const Memory<int>& to, const std::vector<int>& truth) {
  return std::memcmp(to.data, truth.data(), to.bytes()) == 0;
}

void test_missing_barrier() {
  Memory<int> from(128), to(128);
  std::vector<int> truth(128);
  for (int i = 0; i < 128; ++i) from.data[i] = i * i;
  for (int i = 0; i < 128; ++i) truth[size_t(i)] = from.data[i / 64 * 64 + 63 - i % 64];
  int found = 0;
  for (Order order : kOrders) {
    const Launch launch{{2, 1, 1}, {64, 1, 1}, 64 * sizeof(int), order, 7};
    to.poison();
    run(launch, [&] { reverse_block(from.data, to.data, true); });
    expect(agrees(to, truth), "a block reversed with a barrier");
    to.poison();
    run(launch, [&] { reverse_block(from.data, to.data, false); });
    found += !agrees(to, truth);
  }
  expect(found == 3, "a missing barrier shows in every order");
}

void test_missing_second_barrier() {
  Memory<int> from(32), to(32);
  std::vector<int> truth(32);
  for (int i = 0; i < 32; ++i) from.data[i] = i * i;
  for (int i = 0; i < 32; ++i) truth[size_t(i)] = 6 * from.data[31 - i];
  int found = 0;
  for (Order order : kOrders) {
    const Launch launch{{1, 1, 1}, {32, 1, 1}, 32 * sizeof(int), order, 7};
    run(launch, [&] { rounds(from.data, to.data, true); });
    expect(agrees(to, truth), "rounds with both barriers");
    run(launch, [&] { rounds(from.data, to.data, false); });
    found += !agrees(to, truth);
  }
  expect(found > 0, "a missing second barrier shows in some order");
}

// Writes over what another warp may still read: only a warp that overtakes the others shows it.
__global__ void overtake(const int* from, int* to, bool barrier) {
  int* shared = bsfast::shared_memory<int>();
  shared[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  const int sum = __shfl_xor_sync(0xffffffffu, shared[threadIdx.x ^ 32], 1);
  if (barrier) __syncthreads();
  shared[threadIdx.x] = 0;
  to[threadIdx.x] = sum;
}

void test_overtaking() {
  Memory<int> from(64), to(64);
  std::vector<int> truth(64);
  for (int i = 0; i < 64; ++i) from.data[i] = i * i + 1;
  for (int i = 0; i < 64; ++i) truth[size_t(i)] = from.data[i ^ 33];
  for (Order order : kOrders) {
    const Launch launch{{1, 1, 1}, {64, 1, 1}, 64 * sizeof(int), order, 7};
    run(launch, [&] { overtake(from.data, to.data, true); });
    expect(agrees(to, truth), "one warp behind another, with a barrier");
    run(launch, [&] { overtake(from.data, to.data, false); });
    expect(!agrees(to, truth), "a warp that overtakes another shows");
  }
}

void test_divergence() {
  const Launch launch{{1, 1, 1}, {64, 1, 1}, 0, Order::random, 1};
  expect_error("thread 0 waits for its block", [&] {
    run(launch, [] {
      if (threadIdx.x != 5) __syncthreads();
    });
  });
  expect_error("thread 3 waits for its block", [&] {
    run(launch, [] {
      if (threadIdx.x == 3)
        __syncthreads();
      else
        __syncthreads();
    });
  });
  expect_error("thread 40 waits for its warp", [&] {
    run(launch, [] {
      if (threadIdx.x == 40) __shfl_xor_sync(0xffffffffu, 1, 1);
    });
  });
  expect_error("a lane of its mask", [&] { run(launch, [] { __shfl_sync(0xffffu, 1, 20); }); });
  expect_error("1 to 1024 threads, got 2048", [&] { run({{1, 1, 1}, {1024, 2, 1}}, [] {}); });
  expect_error("65535 blocks along y, got 65536", [&] { run({{1, 65536, 1}, {32, 1, 1}}, [] {}); });
}

void test_shuffle() {
  for (Order order : kOrders)
    run({{1, 1, 1}, {96, 1, 1}, 0, order, 3}, [] {
      const int lane = int(threadIdx.x % 32), warp = int(threadIdx.x / 32);
      expect(__shfl_xor_sync(0xffffffffu, 100 * warp + lane, 6u) == 100 * warp + (lane ^ 6), "shuffle by xor");
      expect(__shfl_sync(0xffffffffu, 100 * warp + lane, 9u) == 100 * warp + 9, "shuffle from a lane");
    });
}

void test_shared_memory_is_poisoned() {
  run({{2, 1, 1}, {32, 1, 1}, 128}, [] {
    expect(std::isnan(bsfast::shared_memory<float>()[threadIdx.x]), "shared memory is NaN at first");
    __syncthreads();
    bsfast::shared_memory<float>()[threadIdx.x] = 1;
  });
}

void test_half() {
  expect(half_from_float(1.0f) == 0x3c00 && half_from_float(-2.5f) == 0xc100, "half of simple numbers");
  expect(half_from_float(65504.0f) == 0x7bff && half_from_float(65519.99f) == 0x7bff, "largest half");
  expect(half_from_float(65520.0f) == 0x7c00 && half_from_float(-1e30f) == 0xfc00, "half infinity");
  expect(half_from_float(0x1p-24f) == 1 && half_from_float(0x1p-25f) == 0 && half_from_float(0x1.8p-24f) == 2,
         "smallest half; ties to even");
  expect(half_from_float(1 + 0x1p-11f) == 0x3c00 && half_from_float(1 + 0x1.8p-10f) == 0x3c02, "ties to even");
  expect(std::isnan(half_to_float(half_from_float(NAN))) && std::isinf(half_to_float(0x7c00)), "half NaN, infinity");
  for (unsigned bits = 0; bits < 0x7c00; ++bits) {
    const float exact = half_to_float(uint16_t(bits));
    const float next = bits == 0x7bff ? 65536.0f : half_to_float(uint16_t(bits + 1)),
                middle = exact + (next - exact) / 2;
    const bool below = half_from_float(std::nextafter(middle, 0.0f)) == bits;
    const bool above = half_from_float(std::nextafter(middle, 1e9f)) == bits + 1;
    const bool tie = half_from_float(middle) == (bits % 2 ? bits + 1 : bits);
    if (half_from_float(exact) != bits || !below || !above || !tie)
      return expect(false, "half rounding at " + std::to_string(bits));
  }
}

// c = a b, with fragments put together one number at a time; `shift` is the planted fault.
__global__ void product(const uint16_t* a, const uint16_t* b, float* c, unsigned shift) {
  const unsigned lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
  const auto word = [](uint16_t low, uint16_t high) { return unsigned(low) | unsigned(high) << 16; };
  const auto left = [&](unsigned row, unsigned k) { return word(a[row * 16 + k], a[row * 16 + k + 1]); };
  const auto right = [&](unsigned k) { return word(b[k * 8 + group], b[(k + 1) * 8 + group]); };
  const unsigned as[4] = {left(group, pair), left(group + 8, pair), left(group, pair + 8), left(group + 8, pair + 8)};
  const unsigned bs[2] = {right(pair), right((pair + 8 + shift) % 16)};
  float sums[4] = {};
  multiply_16x8x16<half_to_float>(sums, as, bs);
  for (unsigned i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[i];
}

// The same for four products at once, of 8x4 and 4x8 matrices; the element (row, k) of a goes to the lane whose table
// the manual prints as a figure: T0-T3 hold columns 0-3 of rows 0-3, T16-T19 of rows 4-7.
__global__ void four_products(const uint16_t* a, const uint16_t* b, float* c, unsigned shift) {
  constexpr unsigned kThreadOf[2] = {0, 16}, kColumnsOf[2][4] = {{0, 1, 4, 5}, {2, 3, 6, 7}};
  const unsigned lane = threadIdx.x;
  for (unsigned product = 0; product < 4; ++product)
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned first = kThreadOf[half] + 4 * product;
      if (lane < first || lane >= first + 4) continue;
      const unsigned t = lane - first;
      const uint16_t *left = a + product * 32, *right = b + product * 32;
      const auto two = [](const uint16_t* from, unsigned stride) { return unsigned(from[0]) | from[stride] << 16u; };
      const uint16_t* column = right + half * 4 + (t + shift) % 4;
      const unsigned as[2] = {two(left + half * 16 + t, 4), two(left + half * 16 + 8 + t, 4)};
      const unsigned bs[2] = {two(column, 8), two(column + 16, 8)};
      float sums[8] = {};
      multiply_8x8x4<half_to_float>(sums, as, bs, "four_products", 0);
      // Rows 0 and 2, or 1 and 3, of its half; four columns of each.
      for (unsigned i = 0; i < 4; ++i)
        for (unsigned row = 0; row < 2; ++row)
          c[product * 64 + (half * 4 + row * 2 + t % 2) * 8 + kColumnsOf[t / 2][i]] = sums[i / 2 * 4 + row * 2 + i % 2];
    }
}

void test_four_products() {
  Memory<uint16_t> a(128), b(128);
  Memory<float> c(256);
  std::mt19937 random(1);
  for (auto* memory : {&a, &b})
    for (int64_t i = 0; i < memory->count; ++i) memory->data[i] = half_from_float(float(int(random() % 17) - 8));
  const auto errors = [&](unsigned shift) {
    int wrong = 0;
    c.poison();
    run({{1, 1, 1}, {32, 1, 1}, 0, Order::random, 5}, [&] { four_products(a.data, b.data, c.data, shift); });
    for (int at = 0; at < 256; ++at) {
      const int first = at / 64 * 32, i = at / 8 % 8, j = at % 8;
      float sum = 0;
      for (int k = 0; k < 4; ++k)
        sum += half_to_float(a.data[first + i * 4 + k]) * half_to_float(b.data[first + k * 8 + j]);
      wrong += !(c.data[at] == sum);
    }
    return wrong;
  };
  expect(errors(0) == 0, "four products of matrices");
  expect(errors(1) > 0, "a wrong fragment index of four products shows");
}

void test_fragments() {
  Memory<uint16_t> a(256), b(128);
  Memory<float> c(128);
  std::mt19937 random(1);
  for (auto* memory : {&a, &b})
    for (int64_t i = 0; i < memory->count; ++i) memory->data[i] = half_from_float(float(int(random() % 17) - 8));
  const auto errors = [&](unsigned shift) {
    int wrong = 0;
    c.poison();
    run({{1, 1, 1}, {32, 1, 1}, 0, Order::random, 5}, [&] { product(a.data, b.data, c.data, shift); });
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j) {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += half_to_float(a.data[i * 16 + k]) * half_to_float(b.data[k * 8 + j]);
        wrong += !(c.data[i * 8 + j] == sum);
      }
    return wrong;
  };
  expect(errors(0) == 0, "a product of matrices");
  expect(errors(2) > 0, "a wrong fragment index shows");
}

void test_load_matrices() {
  Memory<uint16_t> from(4 * 64);
  for (int i = 0; i < 256; ++i) from.data[i] = uint16_t(i);
  for (bool transposed : {false, true})
    run({{1, 1, 1}, {32, 1, 1}}, [&] {
      unsigned to[4];
      load_matrices(to, from.data + threadIdx.x * 8, transposed, __FILE__, __LINE__);
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = threadIdx.x / 4, column = threadIdx.x % 4 * 2, first = i * 64;
        const unsigned low = transposed ? first + column * 8 + row : first + row * 8 + column;
        expect(to[i] == (low | (low + (transposed ? 8 : 1)) << 16), "four matrices loaded");
      }
    });
  expect_error("a multiple of 16 bytes", [&] {
    run({{1, 1, 1}, {32, 1, 1}}, [&] {
      unsigned to[4];
      load_matrices(to, from.data + threadIdx.x, false, __FILE__, __LINE__);
    });
  });
}

void plant(const std::string& where) {
  Memory<int> from(128), to(128 - (where == "global"));
  std::memset(from.data, 0, from.bytes());
  const size_t shared = (where == "shared" ? 63 : 64) * sizeof(int);
  run({{2, 1, 1}, {64, 1, 1}, shared}, [&] { reverse_block(from.data, to.data, true); });
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    plant(arguments[1]);
    return 0;
  }
  test_missing_barrier();
  test_missing_second_barrier();
  test_overtaking();
  test_divergence();
  test_shuffle();
  test_shared_memory_is_poisoned();
  test_half();
  test_fragments();
  test_four_products();
  test_load_matrices();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
