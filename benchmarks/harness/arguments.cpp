// Options and suites.
#include <algorithm>
#include <cstdlib>
#include <map>

#include "harness.h"

namespace alore::harness {
namespace {

using kernels::DType;

const std::map<std::string, DType> kDtypes = {{"fp64", DType::kFloat64},
                                              {"fp32", DType::kFloat32},
                                              {"bf16", DType::kBFloat16},
                                              {"fp16", DType::kFloat16}};
const std::map<std::string, Map> kMaps = {{"layer_norm_alore", Map::kLayerNormAlore},
                                          {"alore", Map::kAlore},
                                          {"kron_linear", Map::kKronLinear},
                                          {"merge_kron", Map::kMergeKron},
                                          {"masked_lora_linear", Map::kMaskedLora}};

template <typename T>
T choice(const std::string& option, const std::map<std::string, T>& choices, const std::string& value) {
  const auto found = choices.find(value);
  if (found != choices.end()) return found->second;
  std::string names;
  for (const auto& [name, unused] : choices) names += (names.empty() ? "" : ", ") + name;
  throw UsageError(option + " must be one of " + names + "; got '" + value + "'");
}

int64_t positive(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 1 || value > (int64_t{1} << 30)) {
    throw UsageError(option + " must be an integer from 1 to 2^30, got '" + text + "'");
  }
  return value;
}

// Why a case cannot run there, or empty.
std::string refusal(const Case& c, Device device) {
  const bool narrow = kernels::size_of(c.dtype) == 2;
  if (c.dim % c.experts != 0) {
    return "--dim must be divisible by --experts, got " + std::to_string(c.dim) + " and " +
           std::to_string(c.experts);
  }
  if (c.backward && c.map == Map::kMergeKron) return "merge_kron has no backward";
  if (device == Device::kCpu) {
    if (narrow) return "the CPU kernels compute in fp32 and fp64: --dtype must be one of them";
    if (c.map == Map::kMergeKron || c.map == Map::kMaskedLora) {
      return c.op() + " is measured on CUDA alone: on a CPU its products are torch's";
    }
  }
  if (c.map == Map::kMaskedLora && (!narrow || c.dim % 8 != 0 || c.experts * c.rank > 16)) {
    return "masked_lora_linear is measured where the fused kernels take it: bf16 or fp16, --dim a multiple "
           "of 8, "
           "--experts * --rank at most 16";
  }
  return {};
}

struct Suite {
  std::vector<std::pair<int64_t, int64_t>> shapes;            // tokens, dim
  std::vector<std::pair<int64_t, int64_t>> adapters{{4, 4}};  // experts, rank
  std::vector<DType> dtypes{DType::kBFloat16};
  std::vector<std::pair<int64_t, int64_t>> merges;  // rows of all weights together, dim
};

const std::map<std::string, Suite>& suites() {
  // vit_b: a ViT-B/16 step at batch 256 and 32; a merge of qkv and fc1 of its 12 blocks. swin_b: the four
  // stages of a Swin-B step at batch 128. quick: small and odd shapes, for ctest; one of more than kMostRows
  // tokens.
  static const std::map<std::string, Suite> all = {
      {"vit_b", {.shapes = {{50432, 768}, {6304, 768}}, .merges = {{12 * 7 * 768, 768}}}},
      {"swin_b", {.shapes = {{401408, 128}, {100352, 256}, {25088, 512}, {6272, 1024}}}},
      {"quick",
       {.shapes = {{1, 96},
                   {19, 93},
                   {37, 96},
                   {197, 192},
                   {1400, 48},
                   {5, 240},
                   {67, 128},
                   {67, 256},
                   {67, 384},
                   {67, 512},
                   {67, 768},
                   {67, 1024}},
        .adapters = {{4, 4}, {3, 5}, {1, 8}, {8, 2}},
        .dtypes = {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kFloat64},
        .merges = {{19, 96}, {1000, 192}}}},
  };
  return all;
}

// The suite's cases that the device takes; without --dtype in its own dtypes, or float32 where the CPU has
// none.
std::vector<Case> cases_of(const Suite& suite, std::optional<DType> dtype, Device device) {
  std::vector<DType> dtypes = suite.dtypes;
  if (dtype) dtypes = {*dtype};
  if (!dtype && dtypes.size() == 1 && device == Device::kCpu) dtypes = {DType::kFloat32};
  std::vector<Case> cases;
  const auto add = [&](const Case& c) {
    if (refusal(c, device).empty()) cases.push_back(c);
  };
  for (const DType type : dtypes)
    for (const auto& [experts, rank] : suite.adapters) {
      for (const auto& [tokens, dim] : suite.shapes)
        for (const Map map : {Map::kLayerNormAlore, Map::kAlore, Map::kKronLinear, Map::kMaskedLora})
          for (const bool backward : {false, true}) add({map, backward, tokens, dim, experts, rank, type});
      for (const auto& [tokens, dim] : suite.merges)
        add({Map::kMergeKron, false, tokens, dim, experts, rank, type});
    }
  return cases;
}

}  // namespace

std::string Case::op() const {
  for (const auto& [name, value] : kMaps) {
    if (value == map) return backward ? name + "_backward" : name;
  }
  return {};
}

std::string Case::shape() const {
  return std::to_string(tokens) + " x " + std::to_string(dim) + " n=" + std::to_string(experts) +
         " r=" + std::to_string(rank);
}

const char* usage() {
  return "usage: alore_bench [--op OP [--backward] [--tokens N] [--dim N] [--experts N] [--rank N] | --suite "
         "SUITE]\n"
         "                   [--dtype DTYPE] [--device DEVICE] [--repeats N] [--check-only] [--json FILE]\n"
         "  OP      layer_norm_alore (default), alore, kron_linear; CUDA: merge_kron, masked_lora_linear\n"
         "  SUITE   vit_b, swin_b, quick\n"
         "  DTYPE   bf16, fp16, fp32 (default of --op), fp64; the CPU kernels take fp32 and fp64\n"
         "  DEVICE  cuda (default where there is one) or cpu\n"
         "  FILE    results as a JSON array; - for stdout, in place of the table\n"
         "Exit status: 0, 1 when a result is wrong or a call fails, 2 for bad arguments.\n";
}

Settings parse(int argc, char** argv) {
  Settings settings;
  settings.device = cuda_available() ? Device::kCuda : Device::kCpu;
  Case single;
  std::optional<DType> dtype;
  const Suite* suite = nullptr;
  std::string of_op;  // an option that a suite leaves no room for
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--check-only" || name == "--backward") {
      (name == "--backward" ? single.backward : settings.check_only) = true;
      if (name == "--backward") of_op = name;
      continue;
    }
    const std::map<std::string, int64_t*> sizes = {{"--tokens", &single.tokens},
                                                   {"--dim", &single.dim},
                                                   {"--experts", &single.experts},
                                                   {"--rank", &single.rank}};
    const bool known = sizes.count(name) || name == "--op" || name == "--suite" || name == "--dtype" ||
                       name == "--device" || name == "--repeats" || name == "--json";
    if (!known) throw UsageError("no option '" + name + "'");
    if (i + 1 == argc) throw UsageError(name + " needs a value");
    const std::string value = argv[++i];
    if (name == "--op") {
      single.map = choice(name, kMaps, value);
      of_op = name;
    } else if (sizes.count(name)) {
      *sizes.at(name) = positive(name, value);
      of_op = name;
    } else if (name == "--suite") {
      choice(name, suites(), value);
      suite = &suites().at(value);
    } else if (name == "--dtype") {
      dtype = choice(name, kDtypes, value);
    } else if (name == "--device") {
      const std::map<std::string, Device> devices = {{"cpu", Device::kCpu}, {"cuda", Device::kCuda}};
      settings.device = choice(name, devices, value);
      if (settings.device == Device::kCuda && !cuda_available()) {
        throw UsageError("--device cuda: no CUDA device, or built with -DALORE_CUDA=OFF");
      }
    } else if (name == "--repeats") {
      settings.repeats = static_cast<int>(positive(name, value));
    } else {
      settings.json = value;
    }
  }
  if (suite != nullptr) {
    if (!of_op.empty()) throw UsageError(of_op + " and --suite exclude each other");
    settings.cases = cases_of(*suite, dtype, settings.device);
    if (settings.cases.empty()) throw UsageError("this device takes no case of the suite in that --dtype");
    return settings;
  }
  single.dtype = dtype.value_or(DType::kFloat32);
  if (const std::string why = refusal(single, settings.device); !why.empty()) throw UsageError(why);
  settings.cases = {single};
  return settings;
}

}  // namespace alore::harness
