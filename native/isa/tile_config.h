// What LDTILECFG reads: 64 bytes. Included by tile_hw.h and tile_emu.h.
struct alignas(64) tile_config {
  std::uint8_t palette = 1;    // 1: eight tiles of at most 16 rows of 64 bytes; 0: no tiles
  std::uint8_t start_row = 0;  // where an interrupted load or store goes on
  std::uint8_t reserved[14] = {};
  std::uint16_t colsb[16] = {};  // bytes per row; of tiles [0, 8), the others are reserved
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(tile_config) == 64);
