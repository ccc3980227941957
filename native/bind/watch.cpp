// Whether the tensors of a call are those of the call before: a look at each, without Python between them.
#include <cstdint>
#include <vector>

#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

class watch {
 public:
  // Begins to watch a tensor that is an argument of each call.
  void add(std::size_t position, nb::object tensor, std::uintptr_t storage) {
    PyObject* reference = PyWeakref_NewRef(tensor.ptr(), nullptr);
    if (!reference) nb::raise_python_error();
    seen_.push_back({position, nb::steal(reference), integer(attribute_of(tensor, version())), storage});
  }

  bool holds(const arguments_of_call& arguments) const {
    for (const watched& s : seen_) {
      if (s.position >= arguments.size()) return false;
      const nb::handle tensor = arguments[s.position];
      if (!refers_to(s.reference, tensor)) return false;
      if (integer(attribute_of(tensor, version())) != s.version) return false;
      const nb::object storage = attribute_of(result_of(tensor, untyped_storage()), cdata());
      if (static_cast<std::uintptr_t>(integer(storage)) != s.storage) return false;
    }
    return true;
  }

 private:
  struct watched {
    std::size_t position;
    nb::object reference;
    std::int64_t version;
    std::uintptr_t storage;
  };
  // Whether a weak reference is one to an object that is alive.
  static bool refers_to(nb::handle reference, nb::handle object) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* found = nullptr;
    if (PyWeakref_GetRef(reference.ptr(), &found) < 0) nb::raise_python_error();
    return nb::steal(found).is(object);
#else
    const PyObject* found = PyWeakref_GetObject(reference.ptr());
    return found != Py_None && found == object.ptr();  // None: it is gone
#endif
  }
  static PyObject* version() {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    return name;
  }
  static PyObject* untyped_storage() {
    static PyObject* const name = PyUnicode_InternFromString("untyped_storage");
    return name;
  }
  static PyObject* cdata() {
    static PyObject* const name = PyUnicode_InternFromString("_cdata");
    return name;
  }
  std::vector<watched> seen_;
};

}  // namespace

void bind_watch(nb::module_& m) {
  nb::class_<watch>(m, "Watch", "Tensors as they were: the same ones, in the same memory, not written to.")
      .def(nb::init<>())
      .def("add", &watch::add, "position"_a, "tensor"_a, "storage"_a,
           "Begin to watch an argument. storage: the address of its storage, which must be kept from having another "
           "tensor's.")
      .def("holds", &watch::holds, "arguments"_a, "Return whether those of a call are as they were.");
}
