// Whether places in Python's dictionaries hold what they held, and tensors are what they were. Thousands of them are looked at before
// every call, and Python's own loops take longer over that than over the rest of what it does. See still.py.

#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

extern "C" {

// Of Python's stable interface, without its headers, which need not be there.
struct _object;
_object* PyDict_GetItemWithError(_object* dict, _object* key);
_object* PyObject_Type(_object* of);
void Py_DecRef(_object* of);

struct Place {
  _object *dict, *key, *value;  // value: null where nothing was
};

// How a dictionary begins up to Python 3.12, which counts all writes to dictionaries: each takes the next number. still.py tries
// whether that is so before it relies on it.
struct Dict {
  int64_t references;
  void* type;
  int64_t used;
  uint64_t version;
};

struct Tagged {
  const Dict* dict;
  uint64_t version;
};

struct Typed {
  _object *of, *type;
};

struct Written {
  c10::TensorImpl* tensor;
  int64_t version;
  const void* data;
};

struct Formed {
  const c10::TensorImpl* tensor;
  int64_t keys, type, dimensions, sizes[5], strides[5];
};

static Formed formed(const c10::TensorImpl* t) {
  Formed made{t, static_cast<int64_t>(t->key_set().raw_repr()), static_cast<int64_t>(t->dtype().toScalarType()), t->dim(), {}, {}};
  made.type = (made.type << 16) + 2 * (t->device().index() + 1) + t->requires_grad();
  std::copy(t->sizes().begin(), t->sizes().end(), made.sizes);
  std::copy(t->strides().begin(), t->strides().end(), made.strides);
  return made;
}

int lwcompile_places(const Place* all, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (PyDict_GetItemWithError(all[i].dict, all[i].key) != all[i].value) return 0;
  return 1;
}

int lwcompile_tags(const Tagged* all, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (all[i].dict->version != all[i].version) return 0;
  return 1;
}

int lwcompile_tag(Tagged* all, int64_t count) {
  for (int64_t i = 0; i < count; i++) all[i].version = all[i].dict->version;
  return 1;
}

int lwcompile_types(const Typed* all, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    _object* type = PyObject_Type(all[i].of);
    Py_DecRef(type);
    if (type != all[i].type) return 0;
  }
  return 1;
}

int lwcompile_tensors(const Written* all, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (all[i].tensor->version_counter().current_version() != all[i].version || all[i].tensor->data() != all[i].data) return 0;
  return 1;
}

int lwcompile_form(Formed* all, int64_t count) {
  for (int64_t i = 0; i < count; i++) all[i] = formed(all[i].tensor);
  return 1;
}

int lwcompile_forms(const Formed* all, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (all[i].tensor->dim() != all[i].dimensions) return 0;  // before more of them are put down than there is room for
    const Formed now = formed(all[i].tensor);
    if (std::memcmp(&now, &all[i], sizeof(now)) != 0) return 0;
  }
  return 1;
}

}  // extern "C"
