// Products of emulated tiles under names of C, for tests/test_amx_emulator.py.
#include <cstdio>
#include <cstdlib>

#define KT_ISA_NAME emulated
#include "../isa/begin.inl"
#include "../isa/tile_emu.h"

// c [m][n] of 4 bytes, a [m][k] of 4 bytes, b [k][n] of 4 bytes; all without gaps.
template <class Product>
void on_tiles(int m, int k, int n, void* c, const void* a, const void* b, Product product) {
  const int rows[] = {m, m, k}, columns[] = {n, k, n};
  tile_config config;
  for (int t = 0; t < 3; ++t) {
    config.rows[t] = static_cast<std::uint8_t>(rows[t]);
    config.colsb[t] = static_cast<std::uint16_t>(4 * columns[t]);
  }
  tiles::load_config(config);
  tiles::load<0>(c, config.colsb[0]);
  tiles::load<1>(a, config.colsb[1]);
  tiles::load<2>(b, config.colsb[2]);
  product();
  tiles::store<0>(c, config.colsb[0]);
  tiles::release();
}

extern "C" void emu_dpbf16(int m, int k, int n, void* c, const void* a, const void* b) {
  on_tiles(m, k, n, c, a, b, tiles::dpbf16<0, 1, 2>);
}

extern "C" void emu_dpbusd(int m, int k, int n, void* c, const void* a, const void* b) {
  on_tiles(m, k, n, c, a, b, tiles::dpbusd<0, 1, 2>);
}
}
}
}
