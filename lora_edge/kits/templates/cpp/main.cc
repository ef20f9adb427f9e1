// generate [--adapter NAME]... [--max-new-tokens 64] TOKEN...: the tokens behind a prompt, a line for
// each adapter that is named, in that order.
#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bundle.h"
#include "model.h"

namespace {

constexpr const char* kUsage = "generate [--adapter NAME]... [--max-new-tokens 64] TOKEN...";

int64_t Number(const std::string& text) {
  size_t read = 0;
  int64_t number = -1;
  try {
    number = std::stoll(text, &read);
  } catch (const std::logic_error&) {
    read = 0;
  }
  if (text.empty() || read != text.size() || number < 0) {
    throw std::invalid_argument(text + " is not a whole number; usage: " + kUsage);
  }
  return number;
}

void Run(const std::vector<std::string>& words) {
  std::vector<std::string> adapters;
  std::vector<int64_t> prompt;
  size_t most = 64;
  for (size_t index = 0; index < words.size(); ++index) {
    const std::string& word = words[index];
    if (word != "--adapter" && word != "--max-new-tokens") {
      prompt.push_back(Number(word));
      continue;
    }
    if (++index == words.size()) throw std::invalid_argument(word + " needs a value");
    if (word == "--adapter") {
      adapters.push_back(words[index]);
    } else {
      most = static_cast<size_t>(Number(words[index]));
    }
  }
  if (prompt.empty()) throw std::invalid_argument(std::string("usage: ") + kUsage);
  if (adapters.empty()) adapters.push_back(bundle::kDefault);
  Model model(BUNDLE);
  for (const std::string& adapter : adapters) {
    const std::vector<int64_t> found = model.Generate(prompt, adapter, most);
    std::cout << adapter << ":";
    for (int64_t token : found) std::cout << " " << token;
    std::cout << std::endl;
  }
}

}  // namespace

int main(int count, char** words) {
#ifdef _WIN32
  _putenv_s("ORT_DISABLE_TELEMETRY", "1");
#else
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
#endif
  try {
    Run(std::vector<std::string>(words + 1, words + count));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 2;
  }
  return 0;
}
