// One MoE layer whose tokens choose among four experts, with as many experts as the argument says: for callgrind, which
// counts what a call costs (benchmarks/scaling.py). Prints how many calls it made.
#include <kt/context.h>
#include <kt/isa.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int count, char** arguments) {
  if (count != 2) return std::fputs("usage: scaling EXPERTS\n", stderr), 2;
  constexpr std::size_t tokens = 16;
  constexpr int top_k = 2, calls = 4;
  kt::experts_shape shape;
  shape.num_experts = std::atoi(arguments[1]);
  shape.hidden_size = 256;
  shape.intermediate_size = 128;
  const kt::experts experts(shape, {kt::format::bf16, 0, kt::scale_type::none, false});
  std::vector<std::uint16_t> hidden(tokens * shape.hidden_size, 0x3f80), out(hidden.size());
  std::vector<std::int64_t> ids(tokens * top_k);
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(i % 4) * (shape.num_experts / 4);
  const std::vector<float> weights(ids.size(), 0.5f);
  kt::moe_arguments a;
  a.tokens = tokens;
  a.top_k = top_k;
  a.hidden = hidden.data();
  a.hidden_type = kt::dtype::bf16;
  a.hidden_stride = a.out_stride = shape.hidden_size;
  a.ids = ids.data();
  a.weights = weights.data();
  a.out = out.data();
  kt::context context(1);
  const kt::isa* isa = kt::find_isa("avx2");
  if (!isa || !kt::runs_on(*isa, kt::cpu_features())) isa = kt::find_isa("scalar");
  for (int i = 0; i < calls; ++i) {
    const std::string wrong = context.moe(experts, *isa->kernels, a);
    if (!wrong.empty()) return std::fputs(wrong.c_str(), stderr), 1;
  }
  std::printf("%d calls of %zu tokens on %s\n", calls, tokens, isa->name);
}
