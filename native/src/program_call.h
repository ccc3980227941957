// What the files that run the steps of programs share.
#pragma once
#include <kt/isa.h>
#include <kt/program.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arrays.h"

namespace kt {

struct program::step {
  opcode op;
  std::vector<int> in;
  int out, outs;
  std::vector<whole_number> n;
  std::vector<real_number> x;
  int packed;
};

struct program::packed {
  const packed_weight* weight = nullptr;
  std::size_t features = 0, k = 0;  // of a head
  std::int64_t heads = 1;
  const experts* all = nullptr;
  const isa* set = nullptr;
};

// One call: where its arrays are.
struct program::call {
  program& p;
  context& c;
  const kernel_table& k;
  const std::vector<std::int64_t>& whole;
  const std::vector<double>& real;
  const allocator& allocate;
  std::vector<array> arrays;
  std::vector<std::vector<buffer>> memory;  // of each group
  std::vector<const char*> given;           // by the allocator, in order

  std::int64_t number(const step& s, std::size_t i) const {
    const whole_number& n = s.n[i];
    return n.slot < 0 ? n.value : whole[static_cast<std::size_t>(n.slot)];
  }
  double real_number_of(const step& s, std::size_t i) const {
    const real_number& x = s.x[i];
    return x.slot < 0 ? x.value : real[static_cast<std::size_t>(x.slot)];
  }
  const array& in(const step& s, std::size_t i) const { return arrays[static_cast<std::size_t>(s.in[i])]; }
  array& out(const step& s, int i = 0) { return arrays[static_cast<std::size_t>(s.out + i)]; }

  buffer& take(int group, std::size_t bytes) {
    std::size_t best = p.free_.size();
    for (std::size_t i = 0; i < p.free_.size(); ++i)
      if (p.free_[i].bytes() >= bytes && (best == p.free_.size() || p.free_[i].bytes() < p.free_[best].bytes()))
        best = i;
    std::vector<buffer>& own = memory[static_cast<std::size_t>(group)];
    if (best == p.free_.size()) {
      own.emplace_back(std::max<std::size_t>(bytes, 1));
    } else {
      own.push_back(std::move(p.free_[best]));
      p.free_[best] = std::move(p.free_.back());
      p.free_.pop_back();
    }
    return own.back();
  }

  // Memory for a result of a step.
  array& place(const step& s, int i, element type, const std::int64_t* shape, int rank) {
    array a;
    a.type = type;
    a.rank = rank;
    std::copy(shape, shape + rank, a.shape);
    set_contiguous(a);
    const int group = p.group_[static_cast<std::size_t>(s.out + i)];
    if (p.leaves_[static_cast<std::size_t>(group)]) {
      a.data = static_cast<char*>(allocate(type, shape, rank));
      a.source = static_cast<int>(given.size());
      given.push_back(a.data);
    } else {
      a.data = take(group, static_cast<std::size_t>(a.count()) * size_of(type)).as();
      a.source = array::own;
    }
    return out(s, i) = a;
  }

  // `a` itself if it is contiguous, else a copy in memory of the program, freed with a result of the step.
  array dense(const step& s, const array& a) {
    if (a.contiguous()) {
      array b = a;
      set_contiguous(b);
      return b;
    }
    array b = a;
    set_contiguous(b);
    b.data =
        take(p.group_[static_cast<std::size_t>(s.out)], static_cast<std::size_t>(b.count()) * size_of(b.type)).as();
    copy(c, a, b);
    return b;
  }

  void run(const step& s);
  void reshape(const step& s);
  void compute_linear(const step& s);
  void compute_moe(const step& s);
  void compute_norm(const step& s, bool add);
  void compute_rotary(const step& s);
  void compute_attention(const step& s);
  void compute_cached_attention(const step& s);
  void store_rows(const array& rows, const array& slots, const array& blocks, const array* scales);
  void compute_elementwise(const step& s);
  void compute_integers(const step& s);
  void add_number(const step& s);
  void arange(const step& s);
  void embedding(const step& s);
  void compute_rows(const step& s);
  void concat(const step& s);
  void index_select(const step& s);
  void index_copy(const step& s);
};

}  // namespace kt
