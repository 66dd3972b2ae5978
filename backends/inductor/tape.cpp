// A call of compiled code that was recorded, made again without Python: `torch.classes.lwcompile.Tape`.
//
// A slot holds a tensor: what is stored, the call's inputs, buffers that all calls share, buffers that each makes anew, views, and
// what operators return. Kernels read addresses out of slots, operators tensors. See tape.py for what is recorded, and replay.py for when.

#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace {

constexpr size_t MOST = 96;  // arguments of a kernel

template <size_t... I>
void call(void* function, void* const* given, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(decltype((void)I, static_cast<void*>(nullptr))...)>(function)(given[I]...);
}

using Caller = void (*)(void*, void* const*);

template <size_t... N>
constexpr std::array<Caller, sizeof...(N)> callers(std::index_sequence<N...>) {
  return {+[](void* function, void* const* given) { call(function, given, std::make_index_sequence<N>{}); }...};
}

constexpr auto CALLERS = callers(std::make_index_sequence<MOST + 1>{});

// What a tensor is but for its memory.
struct Form {
  explicit Form(const at::Tensor& t)
      : keys(t.key_set()), type(t.dtype()), sizes(t.sizes()), strides(t.strides()), offset(t.storage_offset()), nbytes(t.storage().nbytes()) {}

  bool fits(const at::Tensor& t) const { return t.is_cpu() && t.dtype() == type && t.sizes() == sizes && t.strides() == strides; }

  at::Tensor over(const c10::Storage& memory, int64_t at) const {
    at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(memory), keys, type);
    made.unsafeGetTensorImpl()->set_storage_offset(at);
    made.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
    return made;
  }

  at::Tensor anew() const { return over(at::empty({static_cast<int64_t>(nbytes)}, at::kByte).storage(), offset); }

  c10::DispatchKeySet keys;
  caffe2::TypeMeta type;
  at::DimVector sizes, strides;
  int64_t offset;
  size_t nbytes;
};

struct Step {
  int64_t slot = -1;                                      // of a view, or of a buffer that is made anew
  int64_t base = -1;                                      // of a view
  int64_t offset = 0;                                     // of a view, in elements, from where its base begins
  void* function = nullptr;                               // a kernel
  std::vector<std::pair<int64_t, int64_t>> given;         // its arguments: slot and bytes, or -1 and a number
  std::optional<c10::OperatorHandle> op;                  // an operator
  std::vector<c10::IValue> arguments;                     // what it is called with,
  std::vector<std::pair<size_t, int64_t>> tensors;        // but for these, which are in slots
  std::vector<int64_t> results;                           // slots of what it returns; -1 is let go
};

struct Tape : torch::CustomClassHolder {
  Tape(const std::vector<at::Tensor>& stored, const std::vector<at::Tensor>& inputs) : first(stored.size()), count(inputs.size()) {
    for (const at::Tensor& t : stored) keep(t);
    for (const at::Tensor& t : inputs) slot(t);
  }

  int64_t keep(const at::Tensor& buffer) {
    const int64_t at = slot(buffer);
    slots[at] = buffer;
    return at;
  }

  // Nothing is recorded any more. What lies in buffers that all calls share is found once: addresses for kernels, and views.
  void seal(const std::vector<int64_t>& buffers) {
    std::vector<bool> shared(slots.size());
    for (int64_t at : buffers) shared[at] = true;
    std::vector<Step> left;
    for (Step& step : steps) {
      if (step.base >= 0 && shared[step.base]) {
        make(step);
        shared[step.slot] = true;
        continue;
      }
      for (auto& [at, number] : step.given)
        if (at >= 0 && shared[at]) number += reinterpret_cast<int64_t>(slots[at].mutable_data_ptr()), at = -1;
      for (size_t i = step.tensors.size(); i-- > 0;)
        if (const auto [to, at] = step.tensors[i]; slots[at].defined()) {
          step.arguments[to] = slots[at];
          step.tensors.erase(step.tensors.begin() + i);
        }
      left.push_back(std::move(step));
    }
    steps = std::move(left);
  }

  // The slot's tensor belongs to one call alone from here on.
  void renew(int64_t at) {
    Step step;
    step.slot = at;
    steps.insert(steps.begin(), std::move(step));
    slots[at].reset();
  }

  int64_t view(int64_t base, const at::Tensor& like, int64_t offset) {
    Step step;
    step.slot = slot(like), step.base = base, step.offset = offset;
    steps.push_back(std::move(step));
    return steps.back().slot;
  }

  // Arguments: `numbers[i]` bytes into the tensor in slot `at[i]`, or that number itself where the slot is -1.
  void kernel(int64_t address, const std::vector<int64_t>& at, const std::vector<int64_t>& numbers) {
    TORCH_CHECK(at.size() <= MOST, "a kernel has more than ", MOST, " arguments");
    Step step;
    step.function = reinterpret_cast<void*>(address);
    for (size_t i = 0; i < at.size(); i++) step.given.emplace_back(at[i], numbers[i]);
    steps.push_back(std::move(step));
  }

  // Arguments: the tensor in slot `at[i]`, or the value itself where that is -1; "[]" stands for an empty list. Gives the slots of
  // what it returns, `made`, and -1 for those that are not `kept`.
  std::vector<int64_t> operation(const std::string& name, const std::string& overload, const c10::List<c10::IValue>& arguments,
                                 const std::vector<int64_t>& at, const std::vector<at::Tensor>& made, const c10::List<bool>& kept) {
    Step step;
    step.op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
    const auto& wanted = step.op->schema().arguments();
    for (size_t i = 0; i < arguments.size(); i++) {
      c10::IValue value = arguments.get(i);
      c10::TypePtr type = wanted[i].type();
      if (auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
      if (value.isString() && value.toStringRef() == "[]")
        value = c10::impl::GenericList(type->expectRef<c10::ListType>().getElementType());
      if (value.isInt() && type->kind() == c10::TypeKind::FloatType) value = static_cast<double>(value.toInt());
      if (value.isScalar() && type->kind() == c10::TypeKind::TensorType) {  // as Python passes x * 2
        at::Tensor number = c10::scalar_to_tensor(value.toScalar());
        number.unsafeGetTensorImpl()->set_wrapped_number(true);
        value = number;
      }
      step.arguments.push_back(std::move(value));
      if (at[i] >= 0) step.tensors.emplace_back(i, at[i]);
    }
    for (size_t i = 0; i < made.size(); i++) step.results.push_back(kept[i] ? slot(made[i]) : -1);
    steps.push_back(std::move(step));
    return steps.back().results;
  }

  // The outputs; nothing if the inputs have another form than those recorded, or another thread is here.
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& given, const std::vector<int64_t>& outputs) {
    std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
    if (!lock || given.size() != count) return {};
    for (size_t i = 0; i < count; i++)
      if (!forms[first + i].fits(given[i])) return {};
    struct Emptied {  // also where an operator throws
      Tape& tape;
      ~Emptied() { tape.let_go(); }
    } emptied{*this};
    std::copy(given.begin(), given.end(), slots.begin() + first);
    at::AutoDispatchBelowADInplaceOrView guard;
    for (const Step& step : steps) play(step);
    std::vector<at::Tensor> made;
    for (int64_t at : outputs) made.push_back(slots[at]);
    return made;
  }

 private:
  std::vector<at::Tensor> slots;
  std::vector<Form> forms;
  size_t first, count;  // of the inputs
  torch::jit::Stack stack;
  std::vector<Step> steps;
  std::mutex busy;

  int64_t slot(const at::Tensor& like) {
    slots.emplace_back();
    forms.emplace_back(like);
    return slots.size() - 1;
  }

  void play(const Step& step) {
    if (step.function) return launch(step);
    if (step.op) return dispatch(step);
    make(step);
  }

  void make(const Step& step) {
    if (step.base < 0) {
      slots[step.slot] = forms[step.slot].anew();
    } else {
      const at::Tensor& base = slots[step.base];
      slots[step.slot] = forms[step.slot].over(base.storage(), base.storage_offset() + step.offset);
    }
  }

  void launch(const Step& step) {
    void* given[MOST];
    for (size_t i = 0; i < step.given.size(); i++) {
      const auto [at, number] = step.given[i];
      given[i] = at < 0 ? reinterpret_cast<void*>(number) : static_cast<char*>(slots[at].mutable_data_ptr()) + number;
    }
    CALLERS[step.given.size()](step.function, given);
  }

  void dispatch(const Step& step) {
    stack.assign(step.arguments.begin(), step.arguments.end());
    for (const auto& [i, at] : step.tensors) stack[i] = slots[at];
    step.op->callBoxed(stack);
    for (size_t i = 0; i < step.results.size(); i++)
      if (step.results[i] >= 0) slots[step.results[i]] = std::move(stack[i]).toTensor();
    stack.clear();
  }

  void let_go() {
    stack.clear();
    for (size_t i = 0; i < count; i++) slots[first + i].reset();
    for (const Step& step : steps) {
      if (step.slot >= 0) slots[step.slot].reset();
      for (int64_t at : step.results)
        if (at >= 0) slots[at].reset();
    }
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(lwcompile, m) {
  m.class_<Tape>("Tape")
      .def(torch::init<std::vector<at::Tensor>, std::vector<at::Tensor>>())
      .def("keep", &Tape::keep)
      .def("renew", &Tape::renew)
      .def("seal", &Tape::seal)
      .def("view", &Tape::view)
      .def("kernel", &Tape::kernel)
      .def("operation", &Tape::operation)
      .def("run", &Tape::run);
}
