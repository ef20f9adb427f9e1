#include "model.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace {

const std::string kInputs[] = {"input_ids", "attention_mask", "position_ids",
                               "num_logits_to_keep"};

const bundle::Adapter& Find(const std::string& name) {
  for (const bundle::Adapter& adapter : bundle::kAdapters) {
    if (name == adapter.name) return adapter;
  }
  std::string known;
  for (const bundle::Adapter& adapter : bundle::kAdapters) known += std::string(" ") + adapter.name;
  throw std::invalid_argument("there is no adapter " + name + "; there are:" + known);
}

// FNV-1a, 64 bits.
uint64_t Hash(const std::string& bytes) {
  uint64_t hash = 14695981039346656037u;
  for (unsigned char byte : bytes) hash = (hash ^ byte) * 1099511628211u;
  return hash;
}

void CheckManifest(const std::filesystem::path& folder) {
  std::ifstream file(folder / "lora_edge.json", std::ios::binary);
  if (!file) throw std::runtime_error(folder.string() + " has no lora_edge.json: it is no bundle");
  const std::string found{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (Hash(found) != bundle::kManifest) {
    throw std::runtime_error(folder.string() +
                             " is not the bundle that this program was written for; write the "
                             "project again: lora-edge kit BUNDLE cpp -o FOLDER --force");
  }
}

bool StartsWith(const std::string& text, const char* begin) { return text.rfind(begin, 0) == 0; }

std::vector<std::string> CacheNames(const char* what) {
  std::vector<std::string> names;
  for (int64_t layer = 0; layer < bundle::kLayers; ++layer) {
    for (const char* part : {".key", ".value"}) {
      names.push_back(what + std::to_string(layer) + part);
    }
  }
  return names;
}

// The place in a prompt from which an adapter is active; the prompt's length: nowhere.
size_t StartOf(const std::vector<int64_t>& invocation, const std::vector<int64_t>& prompt) {
  if (invocation.empty()) return 0;
  const auto at =
      std::find_end(prompt.begin(), prompt.end(), invocation.begin(), invocation.end());
  return static_cast<size_t>(at - prompt.begin());
}

Ort::Value Whole(std::vector<int64_t>& values, const std::vector<int64_t>& shape) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<int64_t>(memory, values.data(), values.size(), shape.data(),
                                           shape.size());
}

}  // namespace

Model::Model(const std::filesystem::path& folder) : folder_(folder) {
  CheckManifest(folder);
  env_.DisableTelemetryEvents();
  session_ = Ort::Session(env_, (folder / bundle::kGraph).c_str(), Ort::SessionOptions());
  Ort::AllocatorWithDefaultOptions allocator;
  for (size_t index = 0; index < session_.GetInputCount(); ++index) {
    const std::string name = session_.GetInputNameAllocated(index, allocator).get();
    if (StartsWith(name, "lora.") || StartsWith(name, "past_key_values.")) continue;
    if (std::find(std::begin(kInputs), std::end(kInputs), name) == std::end(kInputs)) {
      throw std::runtime_error("the graph has the input " + name + ", which is not fed here");
    }
    inputs_.push_back(name);
  }
  for (const std::string& name : CacheNames("past_key_values.")) inputs_.push_back(name);
  outputs_ = CacheNames("present.");
  outputs_.insert(outputs_.begin(), bundle::kOutput);
}

const Ort::RunOptions& Model::Active(const std::string& adapter) {
  const auto known = options_.find(adapter);
  if (known != options_.end()) return known->second;
  const std::string file = Find(adapter).file;
  Ort::RunOptions options;
  if (!file.empty()) {
    loaded_.push_back(Ort::LoraAdapter::CreateLoraAdapter((folder_ / file).native(), nullptr));
    options.AddActiveLoraAdapter(loaded_.back());
  }
  return options_.emplace(adapter, std::move(options)).first->second;
}

Model::Sequence Model::Begin() {
  const std::vector<int64_t> shape = {1, bundle::kHeads, 0, bundle::kHeadSize};
  const auto type =
      bundle::kHalf ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  Ort::AllocatorWithDefaultOptions allocator;
  Sequence text;
  for (int64_t index = 0; index < 2 * bundle::kLayers; ++index) {
    text.cache.push_back(Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), type));
  }
  return text;
}

int64_t Model::Extend(Sequence& text, const int64_t* tokens, size_t count,
                      const std::string& adapter) {
  const int64_t fresh = static_cast<int64_t>(count), total = text.length + fresh;
  std::vector<int64_t> ids(tokens, tokens + count), mask(static_cast<size_t>(total), 1), places;
  for (int64_t place = text.length; place < total; ++place) places.push_back(place);
  std::vector<int64_t> last = {1};  // the logits of one token are computed

  std::vector<Ort::Value> fed;
  std::vector<const char*> given, wanted;
  for (const std::string& name : inputs_) {
    given.push_back(name.c_str());
    if (name == "input_ids") {
      fed.push_back(Whole(ids, {1, fresh}));
    } else if (name == "attention_mask") {
      fed.push_back(Whole(mask, {1, total}));
    } else if (name == "position_ids") {
      fed.push_back(Whole(places, {1, fresh}));
    } else if (name == "num_logits_to_keep") {
      fed.push_back(Whole(last, {}));
    } else if (StartsWith(name, "past_key_values.")) {
      fed.push_back(std::move(text.cache[fed.size() - (inputs_.size() - text.cache.size())]));
    }
  }
  for (const std::string& name : outputs_) wanted.push_back(name.c_str());
  std::vector<Ort::Value> found = session_.Run(Active(adapter), given.data(), fed.data(),
                                               fed.size(), wanted.data(), wanted.size());
  text.length = total;
  text.cache.assign(std::make_move_iterator(found.begin() + 1),
                    std::make_move_iterator(found.end()));
  const std::vector<int64_t> shape = found[0].GetTensorTypeAndShapeInfo().GetShape();
  const float* logits = found[0].GetTensorData<float>() + (shape[1] - 1) * shape[2];
  return std::max_element(logits, logits + shape[2]) - logits;
}

std::vector<int64_t> Model::Generate(const std::vector<int64_t>& prompt,
                                     const std::string& adapter, size_t most) {
  if (prompt.empty()) throw std::invalid_argument("the prompt is empty");
  for (int64_t token : prompt) {
    if (token < 0 || token >= bundle::kVocabulary) {
      throw std::invalid_argument("token " + std::to_string(token) + " is not below " +
                                  std::to_string(bundle::kVocabulary));
    }
  }
  if (bundle::kLongest) {
    if (prompt.size() > bundle::kLongest) {
      throw std::invalid_argument("the prompt has " + std::to_string(prompt.size()) +
                                  " tokens, and the model reads " +
                                  std::to_string(bundle::kLongest));
    }
    most = std::min(most, bundle::kLongest - prompt.size() + 1);
  }
  const bundle::Adapter& chosen = Find(adapter);
  const size_t start = StartOf(chosen.invocation, prompt);
  // Before its invocation, such an adapter changes nothing.
  const std::string& then = start < prompt.size() ? adapter : bundle::kDefault;
  Sequence text = Begin();
  int64_t token = 0;
  if (start > 0) token = Extend(text, prompt.data(), start, bundle::kDefault);
  if (start < prompt.size()) {
    token = Extend(text, prompt.data() + start, prompt.size() - start, then);
  }
  std::vector<int64_t> found;
  while (found.size() < most &&
         std::find(chosen.ends.begin(), chosen.ends.end(), token) == chosen.ends.end()) {
    found.push_back(token);
    if (found.size() < most) token = Extend(text, &token, 1, then);
  }
  return found;
}
