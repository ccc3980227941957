// Panels of every format on AMX tiles, but int4_dyn: groups of it are too short for a tile's sums to pay. bf16 and
// int8_dyn are multiplied as they lie, the others unpacked a chunk at a time. Included
// after kernels.inl and gemm_amx.inl.

using bf16_tile_block = block<std::uint16_t, 32, 16>;
using int8_tile_block = block<std::uint8_t, 64, 16>;

// A panel's part as it lies.
inline tile_gemm as_it_lies(const gemm_job& job) {
  return {static_cast<const char*>(job.panel) + job.layout->code_offset(job.k_begin),
          job.rows_packed,
          job.rows,
          job.layout->k,
          job.k_begin,
          job.k_end,
          job.c,
          job.k_begin == 0,
          static_cast<const char*>(job.next),
          part_bytes(job)};
}

inline void gemm_tiles_bf16(const gemm_job& job) { tile_gemm_bf16(as_it_lies(job)); }

// Few rows are a matter of memory, which needs no tiles. The sums are integers: the same either way.
constexpr int few_int8_rows = 4;

inline void gemm_tiles_int8_dyn(const gemm_job& job) {
  if (job.rows <= few_int8_rows) return gemm_int8_dyn<dot, 64>(job);
  tile_gemm_int8(as_it_lies(job));
  if (job.k_end == job.layout->k) scale_int8<dot>(job);
}

inline void add_scaled(const float* sums, const float* scales, int rows, bool first, float* c) {
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < panel_columns; v += vec::lanes) {
      float* to = c + r * panel_columns + v;
      vec::store(to, vec::fma(vec::load(scales + v), vec::load(sums + r * panel_columns + v),
                              first ? vec::zero() : vec::load(to)));
    }
}

constexpr std::size_t bf16_pair = weights<format::bf16>::pair_bytes;

template <format F, bool Own>
void gemm_tiles_grouped(const gemm_job& job) {
  alignas(64) char bf16[128 * panel_columns * 2];  // the longest group
  alignas(64) float scales[panel_columns], sums[most_rows * panel_columns];
  const code_reader<F, Own> reader(job, 0);
  typename code_reader<F, Own>::walk walk(job);
  tile_session session;
  while (walk.k() < job.k_end) {
    const std::size_t k = walk.k(), end = walk.stop(job.k_end);
    read_chunk<bf16_pair, true>(reader, walk, end, bf16,
                                [&](std::size_t at) { load_scales(job.layout->format.scale, reader.at(at), scales); });
    tile_gemm_bf16(session, {bf16, job.rows_packed, job.rows, job.layout->k, k, end, sums, true});
    add_scaled(sums, scales, job.rows, k == 0, job.c);
  }
}

// mxfp4: with its powers of two in the bf16 numbers.
template <>
struct decoder<format::mxfp4, true> : vec::scaled_e2m1_decoder {
  static constexpr int k_step = 4;
  using vec::scaled_e2m1_decoder::scaled_e2m1_decoder;
};

template <format F>
void gemm_tiles_carried(const gemm_job& job) {
  alignas(64) char bf16[unpacked_bytes];
  alignas(64) float scales[panel_columns];
  const panel_layout& l = *job.layout;
  using reader_type = code_reader<F, F == format::mxfp4>;
  const reader_type reader(job, 0);
  typename reader_type::walk walk(job);
  {
    tile_session session;
    for (std::size_t k = job.k_begin, end; k < job.k_end; k = end) {
      end = least(k + chunk_k<bf16_pair>, job.k_end);
      read_chunk<bf16_pair, true>(reader, walk, end, bf16, [](std::size_t) {});
      tile_gemm_bf16(session, {bf16, job.rows_packed, job.rows, l.k, k, end, job.c, k == 0});
    }
  }
  if (F == format::mxfp4 || job.k_end != l.k) return;
  load_scales(l.format.scale, reader.at(l.scale_offset(0)), scales);
  for (int r = 0; r < job.rows; ++r)
    for (int v = 0; v < panel_columns; v += vec::lanes) {
      float* c = job.c + r * panel_columns + v;
      vec::store(c, vec::mul(vec::load(c), vec::load(scales + v)));
    }
}

inline void gemm_tiles_fp8(const gemm_job& job) {
  job.layout->format.group ? gemm_tiles_grouped<format::fp8, false>(job) : gemm_tiles_carried<format::fp8>(job);
}

inline void gemm_tiles_int4(const gemm_job& job) {
  job.layout->format.zero_points ? gemm_tiles_grouped<format::int4, true>(job)
                                 : gemm_tiles_grouped<format::int4, false>(job);
}

// Products of zeros, eight tiles in use; as many for the roofline of either kind.
template <class Dot>
double tile_arithmetic(std::size_t rounds) {
  alignas(64) static constexpr char zeros[1024] = {};
  tile_session session;
  session.configure(16, 16);
  tiles::load<4>(zeros, 64);
  tiles::load<5>(zeros, 64);
  tiles::load<6>(zeros, 64);
  tiles::load<7>(zeros, 64);
  rounds = rounds / 64 + 1;
  for (std::size_t r = 0; r < rounds; ++r) {
    Dot::template add<0, 4, 6>();
    Dot::template add<1, 4, 7>();
    Dot::template add<2, 5, 6>();
    Dot::template add<3, 5, 7>();
  }
  return static_cast<double>(rounds) * 4 * 2 * 16 * 16 * (64 / Dot::bytes);
}

constexpr kernel_table tile_table() {
  kernel_table t{};
  const auto set = [&t](format f, void (*gemm)(const gemm_job&)) { t.gemm[static_cast<int>(f)] = gemm; };
  set(format::bf16, each_panel<gemm_tiles_bf16>);
  set(format::int8, each_panel<gemm_tiles_carried<format::int8>>);
  set(format::int4, each_panel<gemm_tiles_int4>);
  set(format::fp8, each_panel<gemm_tiles_fp8>);
  set(format::mxfp4, each_panel<gemm_tiles_carried<format::mxfp4>>);
  set(format::int8_dyn, each_panel<gemm_tiles_int8_dyn>);
  set(format::int4_dyn, each_panel<gemm_int4_dyn<dot>>);
  t.rows = {2, pack_rows<bf16_tile_block>, activate<bf16_tile_block>};
  t.int8_rows = {1, pack_int8_rows<int8_tile_block, unsigned_codes>, activate<block<float, 1, 1>>};
  t.int4_rows = {1, pack_int8_rows<int8_block, int4_codes>, activate<block<float, 1, 1>>};
  t.quantize_rows = quantize_rows;
  t.accumulate = accumulate;
  t.store = store;
  t.norm = norm;
  t.rotary = rotary;
  t.elementwise = elementwise;
  t.softmax = softmax;
  t.attention = attention;
  t.attention_bf16 = attention_bf16;
  t.rows_in_bf16 = true;
  t.tiles = true;
  t.read_bytes = read_bytes;
  t.arithmetic = tile_arithmetic<tile_dot_bf16>;
  t.int8_arithmetic = tile_arithmetic<tile_dot_int8>;
  return t;
}
