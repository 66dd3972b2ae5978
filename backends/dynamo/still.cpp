// Whether places in Python's dictionaries hold what they held, and tensors are what they were. Thousands of them are looked at before
// every call, and Python's own loops take longer over that than over the rest of what it does. See still.py.

#include <c10/core/TensorImpl.h>

#include <cstdint>

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

}  // extern "C"
