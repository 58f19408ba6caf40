/* Declare as cold what compiled modules call only when an exception is raised or passes through.

scripts/compile.py includes this before each C file that mypyc writes. Much of those files handles exceptions; gcc
places what leads to a cold call apart (-freorder-blocks-and-partition), so that the path of a request takes less of
the processor's instruction cache. The declarations are those of mypyc's CPy.h and of Python.h. */

#include <Python.h>

#define RARE __attribute__((cold))

RARE void CPy_AddTraceback(const char *filename, const char *funcname, int line, PyObject *globals);
RARE void CPy_TypeErrorTraceback(const char *filename, const char *funcname, int line, PyObject *globals,
                                 const char *expected, PyObject *value);
RARE void CPy_TypeError(const char *expected, PyObject *value);
RARE void CPy_Raise(PyObject *exc);
RARE static void CPy_DecRef(PyObject *object); /* elsewhere mypyc writes a macro */
RARE static void CPy_XDecRef(void *object);
RARE PyAPI_FUNC(void) PyErr_SetString(PyObject *type, const char *text);
RARE PyAPI_FUNC(PyObject *) PyErr_NoMemory(void);

#undef RARE
