// A bundle's graph in ONNX Runtime, its adapters and its cache.
#pragma once
#include <onnxruntime_cxx_api.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "bundle.h"

class Model {
 public:
  // Opens the bundle in a folder; throws std::exception where it is not the one that bundle.h tells
  // of.
  explicit Model(const std::filesystem::path& folder);

  // The likeliest tokens behind a prompt: `most` at most, without the one that ends the text.
  // Adapters are switched from call to call.
  std::vector<int64_t> Generate(const std::vector<int64_t>& prompt, const std::string& adapter,
                                size_t most);

 private:
  // Keys and values of the tokens so far, in the order of the graph's inputs past_key_values.N.
  struct Sequence {
    int64_t length = 0;
    std::vector<Ort::Value> cache;
  };

  Sequence Begin();
  // Appends tokens to a text; the likeliest token behind them.
  int64_t Extend(Sequence& text, const int64_t* tokens, size_t count, const std::string& adapter);
  // What a run is given so that an adapter is active: ONNX Runtime feeds the adapter's file.
  const Ort::RunOptions& Active(const std::string& adapter);

  std::filesystem::path folder_;
  Ort::Env env_{ORT_LOGGING_LEVEL_ERROR, "generate"};
  Ort::Session session_{nullptr};
  std::vector<std::string> inputs_, outputs_;
  // A run does not keep its adapter alive.
  std::vector<Ort::LoraAdapter> loaded_;
  std::map<std::string, Ort::RunOptions> options_;
};
