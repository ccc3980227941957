// AVX512-BF16: the same sums as the fp32 kernels in half of the instructions, bit for bit
// (VDPBF16PS is two fused multiply-adds, odd then even, denormals as zero).
#include <immintrin.h>

#include "begin.inl"
#include "vec_avx512.h"
#include "dot_avx512.h"
#include "kernels.inl"
#include "../kernels/attention_bf16.inl"

// The products of one pair of k: pair_at(m), two bf16 of each row, by the N vectors of pairs at b.
template <int M, int N, class A>
[[gnu::always_inline]] inline void multiply_add_pair(vec::f32 (&acc)[M][N], const char* b, A pair_at) {
  __m512bh y[N];
  KT_UNROLLED (n, N) y[n] = (__m512bh)_mm512_loadu_si512(b + n * 64);
  KT_UNROLLED (m, M) {
    const __m512bh x = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair_at(m)));
    KT_UNROLLED (n, N) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], y[n], x);
  }
}

struct dot_step {
  using a_type = std::uint32_t;  // two bf16
  static constexpr int a_per_row = 1;
  static constexpr std::size_t pair_bytes = 2 * panel_columns * 2;
  static constexpr std::size_t lane_bytes = 4;
  static constexpr int unpacked_tiles = 1 << 20;  // other units unpack while VDPBF16PS multiplies
  static constexpr std::size_t short_group = 64;

  template <int M, int N>
  [[gnu::always_inline]] static void run(vec::f32 (&acc)[M][N], const char* w, const a_type* a, std::size_t = M) {
    multiply_add_pair(acc, w, [a](int m) { return a[m]; });
  }
};

// How attention multiplies pairs of bf16.
struct bf16_pairs {
  using element = std::uint16_t;
  static constexpr std::size_t pair_bytes = bf16_pair_bytes, lane_bytes = 4;

  template <int M, int N>
  [[gnu::always_inline]] static void run(vec::f32 (&acc)[M][N], const char* b, const element* a, std::size_t stride) {
    multiply_add_pair(acc, b, [=](int m) { return load_as<std::uint32_t>(a + m * stride); });
  }

  static float number(element x) { return as_f32(static_cast<std::uint32_t>(x) << 16); }
  static vec::f32 value(const char* panel, int j, std::size_t column) {
    const char* pair = panel + static_cast<std::size_t>(j / 2) * pair_bytes + column * lane_bytes;
    return j % 2 ? vec::bf16_odd(pair) : vec::bf16_even(pair);
  }
};

struct bf16_weights {
  static constexpr std::size_t stride = rounded_weights::stride;
  static vec::f32 fraction(vec::f32 r) { return rounded_weights::fraction(r); }
  [[gnu::always_inline]] static void keep(const vec::f32 (&p)[row_vectors], char* row, float* sums, float factor) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    vec::f32 sum = vec::mul(vec::load(sums), vec::set1(factor));
    KT_UNROLLED (i, 2) {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(p[2 * i + 1], p[2 * i]);
      _mm512_storeu_si512(row + i * 64, (__m512i)rounded);
      sum = _mm512_dpbf16_ps(sum, rounded, ones);
    }
    vec::store(sums, sum);
  }
};

constexpr attention_kernels attention_bf16 = {2,
                                              bf16_unit,
                                              copy_bf16_rows,
                                              pack_bf16_keys,
                                              pack_bf16_values,
                                              attend<bf16_pairs, bf16_weights>,
                                              merge_attention,
                                              finish_attention};

double bf16_arithmetic(std::size_t rounds) {
  return arithmetic_chains(rounds, _mm512_set1_epi16(0x3f00), vec::zero(), 4.0 * vec::lanes,
                           [](vec::f32 acc, __m512i x) { return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)x); });
}

}  // namespace

constexpr row_kernels bf16_rows = {2, pack_rows<bf16_block>, activate<bf16_block>};
const kernel_table kernels = table_of<dot_step>(bf16_rows, /*rows_in_bf16=*/true, bf16_arithmetic, attention_bf16);

}  // namespace KT_ISA_NAME
}  // namespace kt
