// The kernels on hardware tiles, and functions in which each store must reach memory, under names of C. For tiles.cpp,
// which runs them, and for tests/test_amx_disassembly.py, which reads them.
#define KT_ISA_NAME hardware
#include "../isa/begin.inl"
#include "../isa/tile_hw.h"
#include "../kernels/gemm_amx.inl"

extern "C" void hw_gemm_bf16(const void* job) { tile_gemm_bf16(*static_cast<const tile_gemm*>(job)); }
extern "C" void hw_gemm_int8(const void* job) { tile_gemm_int8(*static_cast<const tile_gemm*>(job)); }

// One row of 64 bytes to load. No other operand in memory follows, on account of which stores might be kept.
extern "C" void hw_configure() {
  tile_config config;
  config.rows[0] = 1;
  config.colsb[0] = 64;
  tiles::load_config(config);
}
extern "C" void hw_load(std::uint32_t seed) {
  std::uint32_t from[16];
  for (std::uint32_t i = 0; i < 16; ++i) from[i] = seed * i;
  tiles::load<0>(from, 64);
}

// Two rows of 32 bytes go from one array through a tile to another, in which they are 64 bytes apart. Returns the sum
// of what is there then, each number times its place from 1 on.
extern "C" std::uint32_t hw_round_trip(std::uint32_t seed) {
  std::uint32_t from[16], to[32];
  for (std::uint32_t i = 0; i < 16; ++i) from[i] = seed * i;
  for (std::uint32_t& x : to) x = seed;
  tile_config config;
  config.rows[0] = 2;
  config.colsb[0] = 32;
  tiles::load_config(config);
  tiles::load<0>(from, 32);
  tiles::store<0>(to, 64);
  tiles::release();
  std::uint32_t sum = 0;
  for (std::uint32_t i = 0; i < 32; ++i) sum += to[i] * (i + 1);
  return sum;
}
}
}
}
