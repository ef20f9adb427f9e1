// What this library uses of ONNX Runtime's C ABI, and nothing else of it.
//
// ONNX Runtime's Python packages bring no headers. Its table of functions only ever grows: a
// function keeps its place, and what it takes. The places below are those of API 24 (ONNX Runtime
// 1.24) and every later one. The structure of an operator is as of the same release; ONNX Runtime
// reads of it what belongs to the version that the operator says it has.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define LORA_CALL __stdcall
#define LORA_EXPORT extern "C" __declspec(dllexport)
#else
#define LORA_CALL
#define LORA_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace abi {

constexpr uint32_t kVersion = 24;

struct Status;
struct Value;
struct Context;  // of one run of a kernel
struct Info;     // of a kernel's node
struct Options;  // of a session
struct Domain;

using Table = void* const*;  // the functions, one pointer each

struct Base {
  Table(LORA_CALL* table)(uint32_t version);
  const char*(LORA_CALL* version)();
};

// A function of the table: its place and its type.
template <size_t Place, class Function>
struct Entry {
  static Function of(Table table) { return reinterpret_cast<Function>(table[Place]); }
};

template <class... Given>
using Call = Status*(LORA_CALL*)(Given...) noexcept;

using CreateStatus = Entry<0, Status*(LORA_CALL*)(int code, const char* text) noexcept>;
using CreateDomain = Entry<26, Call<const char*, Domain**>>;
using DomainAdd = Entry<27, Call<Domain*, const struct Operator*>>;
using OptionsAdd = Entry<28, Call<Options*, Domain*>>;
using MutableData = Entry<51, Call<Value*, void**>>;
using InputCount = Entry<88, Call<const Context*, size_t*>>;
using Input = Entry<90, Call<const Context*, size_t, const Value**>>;
using Output = Entry<91, Call<Context*, size_t, const int64_t*, size_t, Value**>>;
using Parallel =
    Entry<274, Call<const Context*, void (*)(void*, size_t), size_t, size_t, void*>>;
using Shape = Entry<414, Call<const Value*, int*, const int64_t**, size_t*>>;

constexpr int kFloat = 1;     // element type
constexpr int kRequired = 0;  // characteristics of an input
constexpr int kVariadic = 2;
constexpr int kFail = 1;  // error codes
constexpr int kInvalid = 2;

// An operator, in the order of ONNX Runtime's own structure.
struct Operator {
  uint32_t version;
  void*(LORA_CALL* create)(const Operator*, Table, const Info*);
  const char*(LORA_CALL* name)(const Operator*);
  const char*(LORA_CALL* provider)(const Operator*);
  int(LORA_CALL* input_type)(const Operator*, size_t);
  size_t(LORA_CALL* inputs)(const Operator*);
  int(LORA_CALL* output_type)(const Operator*, size_t);
  size_t(LORA_CALL* outputs)(const Operator*);
  void(LORA_CALL* compute)(void*, Context*);
  void(LORA_CALL* destroy)(void*);
  int(LORA_CALL* input_kind)(const Operator*, size_t);
  int(LORA_CALL* output_kind)(const Operator*, size_t);
  int(LORA_CALL* input_memory)(const Operator*, size_t);
  int(LORA_CALL* least_inputs)(const Operator*);
  int(LORA_CALL* inputs_alike)(const Operator*);
  int(LORA_CALL* least_outputs)(const Operator*);
  int(LORA_CALL* outputs_alike)(const Operator*);
  Status*(LORA_CALL* create_checked)(const Operator*, Table, const Info*, void**);
  Status*(LORA_CALL* compute_checked)(void*, Context*);
  Status*(LORA_CALL* infer_shape)(const Operator*, void*);
  int(LORA_CALL* first_version)(const Operator*);
  int(LORA_CALL* last_version)(const Operator*);
  size_t(LORA_CALL* in_place)(int** inputs, int** outputs);
  void(LORA_CALL* release_in_place)(int* inputs, int* outputs);
  size_t(LORA_CALL* aliases)(int** inputs, int** outputs);
  void(LORA_CALL* release_aliases)(int* inputs, int* outputs);
};

}  // namespace abi
