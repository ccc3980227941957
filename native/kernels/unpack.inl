// Codes of the quantised formats, a few rows of K at a time, as bf16 numbers in the layout of bf16 panels, or as the
// same numbers in fp32 where `vec` makes these faster. They are multiplied from there by the kernels of bf16 or fp32,
// so that a format is one function here and one in `vec`.

template <class Step>
using unpacked_step = std::conditional_t<vec::decodes_to_floats, fma_step<format::f32>, Step>;

// What is unpacked for many rows stays in the first-level cache.
constexpr std::size_t unpacked_bytes = 16384;
template <std::size_t PairBytes>
constexpr std::size_t chunk_k = unpacked_bytes / PairBytes * 2;

constexpr std::size_t least(std::size_t a, std::size_t b) { return a < b ? a : b; }

// Of `vec::lanes` columns from c on.
[[gnu::always_inline]] inline vec::f32 load_scale(scale_type type, const char* scales, int c) {
  switch (type) {
    case scale_type::f32: return vec::load(reinterpret_cast<const float*>(scales) + c);
    case scale_type::f16: return vec::load_f16(scales + 2 * c);
    case scale_type::e8m0: return vec::load_e8m0(scales + c);
    default: return vec::load_bf16(scales + 2 * c);
  }
}
inline void load_scales(scale_type type, const char* scales, float* to) {
  for (int c = 0; c < panel_columns; c += vec::lanes) vec::store(to + c, load_scale(type, scales, c));
}

// Decodes 64 bytes of codes of a part of one group, which are two k or four. `Own`: with what the group has of its own,
// the zero points of int4 or the powers of two of mxfp4.
template <format F, bool Own>
struct decoder : vec::int8_decoder {
  static constexpr int k_step = 2;
  explicit decoder(const char*) : vec::int8_decoder() {}
};
template <bool Own>
struct decoder<format::fp8, Own> : vec::fp8_decoder {
  static constexpr int k_step = 2;
  explicit decoder(const char*) : vec::fp8_decoder() {}
};
template <bool Own>
struct decoder<format::int4, Own> : vec::template int4_decoder<Own> {
  static constexpr int k_step = 4;
  explicit decoder(const char* scales)
      : vec::template int4_decoder<Own>(scales + 2 * panel_columns) {}  // scales have 16 bits
};
template <>
struct decoder<format::mxfp4, false> : vec::e2m1_decoder {
  static constexpr int k_step = 4;
  explicit decoder(const char*) {}
};

template <format F, bool Own>
[[gnu::always_inline]] inline void unpack(const decoder<F, Own>& decode, const char* codes, char* out) {
  if constexpr (vec::decodes_to_floats) {
    KT_UNROLLED (v, column_vectors) {
      vec::f32 values[decoder<F, Own>::k_step];  // all of them before the first is stored over what might be codes
      KT_UNROLLED (k, decode.k_step) values[k] = decode.at(codes, k, v);
      KT_UNROLLED (k, decode.k_step)
        vec::store(reinterpret_cast<float*>(out) + k * panel_columns + v * vec::lanes, values[k]);
    }
  } else {
    decode(codes, out);
  }
}

// acc += rows * codes, of M rows out of `stride` that lie beside each other.
template <class Step, format F, bool Own, int M, int N>
[[gnu::always_inline]] inline void multiply_codes(vec::f32 (&acc)[M][N], const decoder<F, Own>& decode,
                                                  const char* codes, const typename Step::a_type* a,
                                                  std::size_t stride) {
  if constexpr (vec::decodes_to_floats) {
    KT_UNROLLED (i, decode.k_step) {
      const int k = i ^ 1;  // odd before even
      multiply_add(acc, [=](int m) { return a[k * stride + m]; }, [&](int n) { return decode.at(codes, k, n); });
    }
  } else {
    alignas(64) char unpacked[decoder<F, Own>::k_step / 2 * Step::pair_bytes];  // in registers, if the compiler can
    unpack(decode, codes, unpacked);
    KT_UNROLLED (pair, decode.k_step / 2)
      Step::run(acc, unpacked + pair * Step::pair_bytes, a + pair * Step::a_per_row * stride, stride);
  }
}

// Walks over the codes of a panel from k_begin, group by group.
template <int KStep>
class group_walk {
 public:
  explicit group_walk(const gemm_job& job)
      : l_(*job.layout),
        scale_bytes_(l_.scale_bytes()),
        k_(job.k_begin),
        at_(l_.code_offset(k_)),
        group_end_(least(k_ - k_ % l_.group + l_.group, l_.k)) {}

  std::size_t k() const { return k_; }
  std::size_t codes() const { return at_; }                                    // their offset in the panel
  std::size_t scales() const { return at_ + (group_end_ - k_) / KStep * 64; }  // that of the group's scales
  std::size_t stop(std::size_t end) const { return end < group_end_ ? end : group_end_; }
  void go_to(std::size_t stop) {
    at_ += (stop - k_) / KStep * 64;
    k_ = stop;
    if (k_ < group_end_) return;
    at_ += scale_bytes_;
    group_end_ = least(k_ + l_.group, l_.k);
  }

 private:
  const panel_layout& l_;
  const std::size_t scale_bytes_;
  std::size_t k_, at_, group_end_;
};

// Reads a panel, fetching the same part of the panel to come.
template <format F, bool Own>
class code_reader {
 public:
  using each = decoder<F, Own>;
  using walk = group_walk<each::k_step>;
  code_reader(const gemm_job& job, int panel)
      : panel_(static_cast<const char*>(job.panel) + panel * job.layout->bytes()),
        // Without one the present panel is touched again, which costs nothing.
        ahead_(job.next ? static_cast<const char*>(job.next) + panel * job.layout->bytes() -
                              job.layout->code_offset(job.k_begin)
                        : panel_),
        scale_bytes_(job.layout->format.group ? job.layout->scale_bytes() : 0),
        distance_(job.distance) {}

  const char* at(std::size_t offset) const { return panel_ + offset; }

  // The codes at an offset, k_step of k.
  [[gnu::always_inline]] const char* read(std::size_t offset) const {
    prefetch_l1(panel_ + offset + distance_);
    prefetch_l2(ahead_ + offset);
    return panel_ + offset;
  }
  void fetch_scales(std::size_t offset) const {
    for (std::size_t i = 0; i < scale_bytes_; i += 64) {
      prefetch_l1(panel_ + offset + i + distance_);
      prefetch_l2(ahead_ + offset + i);
    }
  }

 private:
  const char* const panel_;
  const char* const ahead_;
  const std::size_t scale_bytes_, distance_;
};

// The numbers of k up to `end`, group by group. Calls each_group(offset of the scales). `Fetch`: codes to come are
// fetched here; else that is the caller's, while it multiplies (chunk_fetch).
template <std::size_t PairBytes, bool Fetch, format F, bool Own, class EachGroup>
[[gnu::always_inline]] inline void read_chunk(const code_reader<F, Own>& reader,
                                              typename code_reader<F, Own>::walk& walk, std::size_t end, char* out,
                                              EachGroup each_group) {
  using each = typename code_reader<F, Own>::each;
  while (walk.k() < end) {
    const std::size_t scales = walk.scales(), stop = walk.stop(end);
    const each decode(reader.at(scales));
    std::size_t at = walk.codes();
    for (std::size_t k = walk.k(); k < stop; k += each::k_step, at += 64) {
      unpack(decode, Fetch ? reader.read(at) : reader.at(at), out);
      out += each::k_step / 2 * PairBytes;
    }
    if (Fetch) reader.fetch_scales(scales);
    each_group(scales);
    walk.go_to(stop);
  }
}

template <int P, int M, int N>
[[gnu::always_inline]] inline void start(vec::f32 (&acc)[P][M][N], const float* c, bool zero) {
  KT_UNROLLED (p, P)
    KT_UNROLLED (m, M)
      KT_UNROLLED (n, N)
        acc[p][m][n] = zero ? vec::zero() : vec::load(c + (p * M + m) * panel_columns + n * vec::lanes);
}

// M rows of a tile of `stride` and one or two panels, which are unpacked as they are multiplied: `a` and `c` are those
// of the first row.
template <class Step, format F, bool Own, bool Grouped, int M, int Panels>
[[gnu::noinline]] void small_tile(const gemm_job& job, const typename Step::a_type* a, std::size_t stride, float* c) {
  using reader_type = code_reader<F, Own>;
  constexpr int n = column_vectors, step = reader_type::each::k_step;
  // Whether what the groups add up to stays in registers too.
  constexpr bool in_registers = Grouped && 2 * Panels * M * n <= vec::accumulators;
  alignas(64) float scales[panel_columns];
  const panel_layout& l = *job.layout;
  const reader_type readers[2] = {{job, 0}, {job, Panels - 1}};
  vec::f32 acc[Panels][M][n], total[Panels][M][n];
  if (!Grouped) start(acc, c, job.k_begin == 0);
  if (in_registers) start(total, c, job.k_begin == 0);
  std::size_t scales_at = 0;
  for (typename reader_type::walk walk(job); walk.k() < job.k_end;) {
    const std::size_t k = walk.k(), stop = walk.stop(job.k_end);
    scales_at = walk.scales();
    const typename reader_type::each decode[2] = {typename reader_type::each(readers[0].at(scales_at)),
                                                  typename reader_type::each(readers[1].at(scales_at))};
    if (Grouped) start(acc, c, true);
    const std::size_t end = walk.codes() + (stop - k) / step * 64;
#pragma GCC unroll 2
    for (std::size_t at = walk.codes(); at < end; at += 64) {
      KT_UNROLLED (p, Panels) multiply_codes<Step>(acc[p], decode[p], readers[p].read(at), a, stride);
      a += step / 2 * Step::a_per_row * stride;
    }
    KT_UNROLLED (p, Panels) {
      readers[p].fetch_scales(scales_at);
      if (!Grouped) continue;
      load_scales(l.format.scale, readers[p].at(scales_at), scales);
      KT_UNROLLED (v, n) {
        const vec::f32 scale = vec::load(scales + v * vec::lanes);
        KT_UNROLLED (m, M) {
          float* to = c + (p * M + m) * panel_columns + v * vec::lanes;
          if (in_registers)
            total[p][m][v] = vec::fma(scale, acc[p][m][v], total[p][m][v]);
          else
            vec::store(to, vec::fma(scale, acc[p][m][v], k ? vec::load(to) : vec::zero()));
        }
      }
    }
    walk.go_to(stop);
  }
  if (Grouped && !in_registers) return;
  const bool scaled = !Grouped && job.k_end == l.k;
  KT_UNROLLED (p, Panels) {
    if (scaled) load_scales(l.format.scale, readers[p].at(scales_at), scales);
    KT_UNROLLED (v, n) {
      const vec::f32 scale = scaled ? vec::load(scales + v * vec::lanes) : vec::set1(1.0f);
      KT_UNROLLED (m, M) {
        const vec::f32 sum = in_registers ? total[p][m][v] : acc[p][m][v];
        vec::store(c + (p * M + m) * panel_columns + v * vec::lanes, scaled ? vec::mul(sum, scale) : sum);
      }
    }
  }
}

template <class Step>
using small_function = void (*)(const gemm_job&, const typename Step::a_type*, std::size_t, float*);

// Rows that keep so many vectors of sums of each row in registers, at most.
constexpr int rows_with(int vectors) {
  int most = 0;
  for (int m = 1; m <= vec::max_rows && vec::tile_vectors(m) == column_vectors; ++m)
    if (m * vectors <= vec::accumulators) most = m;
  return most;
}

// Whether the job was done by such tiles: one, or all where unpacking is free beside the products.
template <class Step, format F, bool Own, bool Grouped>
bool small_job(const gemm_job& job) {
  constexpr int rows_of_two = rows_with(2 * column_vectors), rows_of_one = rows_with(column_vectors);
  constexpr bool whole_tiles = rows_of_one == vec::max_rows;
  static constexpr functions_by_rows<small_function<Step>, rows_of_one> one(
      [](auto rows) { return &small_tile<Step, F, Own, Grouped, rows(), 1>; });
  static constexpr functions_by_rows<small_function<Step>, rows_of_two> two(
      [](auto rows) { return &small_tile<Step, F, Own, Grouped, rows(), 2>; });
  const auto* a = static_cast<const typename Step::a_type*>(job.rows_packed);
  if (job.panels == 2) {
    if (job.rows > rows_of_two) return false;
    two[job.rows](job, a + job.k_begin * job.rows / 2 * Step::a_per_row, job.rows, job.c);
    return true;
  }
  const tiling<> cut(job.rows);
  if (whole_tiles ? cut.count > Step::unpacked_tiles : job.rows > rows_of_one) return false;
  const int most = whole_tiles && Grouped && job.layout->group <= Step::short_group ? rows_of_two : rows_of_one;
  gemm_job each = job;
  for (int t = 0; t < cut.count; ++t) {
    const std::size_t begin = cut.begin(t), rows = cut.begin(t + 1) - begin;
    const auto* tile = a + (begin * job.layout->k + job.k_begin * rows) / 2 * Step::a_per_row;
    const tiling<> parts(static_cast<int>(rows), most);
    for (int p = 0; p < parts.count; ++p, each.next = nullptr) {
      const std::size_t first = parts.begin(p);
      one[parts.begin(p + 1) - first](each, tile + first, rows, job.c + (begin + first) * panel_columns);
    }
  }
  return true;
}

// The codes of the chunk to come, fetched while the first tile multiplies the present one of so many pairs.
class chunk_fetch {
 public:
  chunk_fetch(const gemm_job& job, std::size_t end, std::size_t chunk, std::size_t pairs) {
    const panel_layout& l = *job.layout;
    const bool here = end < job.k_end;
    const std::size_t begin = here ? end : job.k_begin, offset = l.code_offset(begin);
    const std::size_t bytes = l.code_offset(least(begin + chunk, job.k_end)) - offset;
    from_ = static_cast<const char*>(here ? job.panel : job.next);
    if (!from_) return;
    if (here) from_ += offset;
    lines_ = static_cast<int>((bytes / 64 + pairs - 1) / pairs);
  }
  prefetch operator()(int tile) const { return tile || !lines_ ? prefetch{} : prefetch{0, from_, lines_}; }

 private:
  const char* from_;
  int lines_ = 0;
};

// One scale for each column and group of k.
template <class Step, format F, bool Own>
void gemm_grouped(const gemm_job& job) {
  if (small_job<Step, F, Own, true>(job)) return;
  if (job.panels > 1) return each_panel<gemm_grouped<Step, F, Own>>(job);
  alignas(64) char unpacked[unpacked_bytes];
  alignas(64) float scales[chunk_k<Step::pair_bytes> / 32 * panel_columns];
  const panel_layout& l = *job.layout;
  const code_reader<F, Own> reader(job, 0);
  typename code_reader<F, Own>::walk walk(job);
  if (job.k_begin == 0) __builtin_memset(job.c, 0, static_cast<std::size_t>(job.rows) * panel_columns * sizeof(float));
  for (std::size_t k = job.k_begin, end; k < job.k_end; k = end) {
    end = least(k + chunk_k<Step::pair_bytes>, job.k_end);
    const std::size_t whole = (end - k) / l.group;
    const chunk_fetch fetch(job, end, chunk_k<Step::pair_bytes>, (end - k) / 2);
    float* to = scales;
    read_chunk<Step::pair_bytes, false>(reader, walk, end, unpacked, [&](std::size_t at) {
      load_scales(l.format.scale, reader.at(at), to);
      to += panel_columns;
    });
    if (whole) tile_rows<Step, false>(job, unpacked, k, l.group / 2, grouped{whole, scales}, fetch);
    if (const std::size_t rest = end - k - whole * l.group)  // the last group of K is shorter
      tile_rows<Step, false>(job, unpacked + whole * l.group / 2 * Step::pair_bytes, end - rest, rest / 2,
                             grouped{1, scales + whole * panel_columns}, fetch);
  }
}

// One scale for each column.
template <class Step, format F>
void gemm_carried(const gemm_job& job) {
  if (small_job<Step, F, false, false>(job)) return;
  if (job.panels > 1) return each_panel<gemm_carried<Step, F>>(job);
  alignas(64) char unpacked[unpacked_bytes];
  alignas(64) float scales[panel_columns];
  const panel_layout& l = *job.layout;
  const code_reader<F, false> reader(job, 0);
  typename code_reader<F, false>::walk walk(job);
  const bool scaled = job.k_end == l.k;
  if (scaled) load_scales(l.format.scale, reader.at(l.scale_offset(0)), scales);
  for (std::size_t k = job.k_begin, end; k < job.k_end; k = end) {
    end = least(k + chunk_k<Step::pair_bytes>, job.k_end);
    read_chunk<Step::pair_bytes, false>(reader, walk, end, unpacked, [](std::size_t) {});
    tile_rows<Step, false>(job, unpacked, k, (end - k) / 2, carried{k == 0, scaled && end == l.k ? scales : nullptr},
                           chunk_fetch(job, end, chunk_k<Step::pair_bytes>, (end - k) / 2));
  }
}

// Weights of 16 bits, made fp32 once for all rows where the job asks for that and several tiles share them.
template <format W>
void gemm_16(const gemm_job& job) {
  using step = fma_step<format::f32>;
  constexpr int few_tiles = 3;
  if (!job.widen || tiling<>(job.rows).count <= few_tiles) return gemm<fma_step<W>>(job);
  constexpr std::size_t chunk = chunk_k<step::pair_bytes>;
  alignas(64) char wide[unpacked_bytes];
  const panel_layout& l = *job.layout;
  for (std::size_t k = job.k_begin, end; k < job.k_end; k = end) {
    end = least(k + chunk, job.k_end);
    const std::size_t pairs = (end - k) / 2;
    const char* from = static_cast<const char*>(job.panel) + l.code_offset(k);
    float* to = reinterpret_cast<float*>(wide);
    for (std::size_t p = 0; p < pairs; ++p, from += weights<W>::pair_bytes, to += 2 * panel_columns) {
      KT_UNROLLED (v, column_vectors) {
        vec::store(to + v * vec::lanes, weights<W>::even(from, v));
        vec::store(to + panel_columns + v * vec::lanes, weights<W>::odd(from, v));
      }
    }
    tile_rows<step, false>(job, wide, k, pairs, carried{k == 0, nullptr}, chunk_fetch(job, end, chunk, pairs));
  }
}

template <class Step>
void gemm_int8(const gemm_job& job) {
  gemm_carried<Step, format::int8>(job);
}

template <class Step>
void gemm_fp8(const gemm_job& job) {
  job.layout->format.group ? gemm_grouped<Step, format::fp8, false>(job) : gemm_carried<Step, format::fp8>(job);
}

template <class Step>
void gemm_int4(const gemm_job& job) {
  job.layout->format.zero_points ? gemm_grouped<Step, format::int4, true>(job)
                                 : gemm_grouped<Step, format::int4, false>(job);
}

template <class Step>
void gemm_mxfp4(const gemm_job& job) {
  gemm_grouped<Step, format::mxfp4, false>(job);
}
