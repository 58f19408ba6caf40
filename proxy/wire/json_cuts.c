/* Cut the inside out of the long strings of JSON text, and find parts of the short text in the whole one.
 *
 * Nothing of a prompt's text is decoded, but the decoder must find the end of each string, byte by byte. This pass
 * examines 16 or 64 bytes at once and takes an eighth of the time; the decoder then reads the short text. Nothing is
 * judged here: text that is odd in any way (a string without an end, a control character, an unknown escape) is left to
 * the decoder as it is.
 *
 * Every read is below the end of the buffer that Python lends, and all offsets are checked before they are used.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) /* Clang defines it too */
#define WITH_AVX2
#include <immintrin.h>
#endif

#define LONG_BYTES 256           /* shortest string that is worth a cut */
#define KEPT_BYTES 1024          /* kept of a string that may be decoded: a member of the outermost object */
#define KEPT_OF_NAME_BYTES 48    /* kept of any other string that may name a file (`ms:`, `fileid:`) */
#define LONG_MEMBER_BYTES 2048   /* shortest string of those that is worth a cut */
#define TRIED_BYTES (32 * 1024)  /* give up if the text up to here, or an eighth of it, had hardly any long string */

typedef unsigned char byte;

/* The text from offset `at` of the short text on is `removed` bytes further on in the whole text. */
typedef struct {
    Py_ssize_t at;
    Py_ssize_t removed;
} Cut;

typedef struct {
    Cut *cuts;
    Py_ssize_t count;
    Py_ssize_t room;
} Cuts;

static inline int is_special(byte sign)
{
    return sign == '"' || sign == '\\' || sign < 0x20;
}

/* Return the first quote, backslash or control character at or after `at`, `end` if there is none. */
static const byte *next_special(const byte *at, const byte *end)
{
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"'), backslash = _mm_set1_epi8('\\'), last_control = _mm_set1_epi8(0x1f);
    while (end - at >= 16) {
        const __m128i signs = _mm_loadu_si128((const __m128i *)at);
        const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(signs, last_control), signs);
        const __m128i either = _mm_or_si128(_mm_cmpeq_epi8(signs, quote), _mm_cmpeq_epi8(signs, backslash));
        const int found = _mm_movemask_epi8(_mm_or_si128(either, control));
        if (found)
            return at + __builtin_ctz((unsigned)found);
        at += 16;
    }
#elif defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    const uint64_t ones = 0x0101010101010101u, tops = 0x8080808080808080u;
    while (end - at >= 8) {
        uint64_t eight;
        memcpy(&eight, at, 8);
        const uint64_t quote = eight ^ (ones * '"'), backslash = eight ^ (ones * '\\');
        /* the lowest bit set is exact; borrows can only set higher ones in error */
        const uint64_t found = (((quote - ones) & ~quote) | ((backslash - ones) & ~backslash)
                                | ((eight - ones * 0x20) & ~eight)) & tops;
        if (found)
            return at + __builtin_ctzll(found) / 8;
        at += 8;
    }
#endif
    while (at < end && !is_special(*at))
        at++;
    return at;
}

static int is_hex(byte sign)
{
    return (sign >= '0' && sign <= '9') || (sign >= 'a' && sign <= 'f') || (sign >= 'A' && sign <= 'F');
}

/* Return the number that \uXXXX at `at` stands for, -1 if it is not written like that. */
static int code_unit(const byte *at, const byte *end)
{
    if (end - at < 6 || at[0] != '\\' || at[1] != 'u')
        return -1;
    int value = 0;
    for (int i = 2; i < 6; i++) {
        if (!is_hex(at[i]))
            return -1;
        value = 16 * value + (at[i] <= '9' ? at[i] - '0' : (at[i] | 0x20) - 'a' + 10);
    }
    return value;
}

/* Return the length of the escape that begins with the backslash at `at`, 0 if there is no such escape.
 *
 * A pair of surrogates is one escape; a decoder refuses one that is alone.
 */
static Py_ssize_t escape_length(const byte *at, const byte *end)
{
    if (end - at < 2)
        return 0;
    switch (at[1]) {
    case '"': case '\\': case '/': case 'b': case 'f': case 'n': case 'r': case 't':
        return 2;
    case 'u': {
        const int unit = code_unit(at, end);
        if (unit < 0xD800 || unit > 0xDFFF)
            return unit < 0 ? 0 : 6;
        const int second = unit <= 0xDBFF ? code_unit(at + 6, end) : -1;
        return second >= 0xDC00 && second <= 0xDFFF ? 12 : 0;
    }
    default:
        return 0;
    }
}

/* Return the quote that ends the string whose text begins at `at`, NULL if the string is odd. */
static const byte *string_end_anywhere(const byte *at, const byte *end)
{
    for (;;) {
        at = next_special(at, end);
        if (at == end)
            return NULL;
        if (*at == '"')
            return at;
        const Py_ssize_t length = *at == '\\' ? escape_length(at, end) : 0;
        if (!length)
            return NULL;
        at += length;
    }
}

#if defined(WITH_AVX2)
#define AVX2 __attribute__((target("avx2")))

/* Return a bit for each of 64 bytes: set if the byte follows a run of backslashes of odd length.
 *
 * `carried` is 1 if the first byte is escaped by the 64 bytes before it, and becomes 1 if these escape the next one.
 * A run is of odd length if it begins at an even place and ends before an odd one, or the other way round; the sum of
 * a run and its first bit has the bit of the place behind it (Langdale and Lemire: Parsing Gigabytes of JSON per
 * Second, 2019).
 */
static inline uint64_t escaped_places(uint64_t backslashes, uint64_t *carried)
{
    const uint64_t even = 0x5555555555555555u, escaped_first = *carried;
    backslashes &= ~escaped_first;
    const uint64_t begins = backslashes & ~(backslashes << 1);
    const uint64_t from_even = backslashes + (begins & even), from_odd = backslashes + (begins & ~even);
    *carried = from_odd < backslashes; /* it overflowed: a run from an odd place reaches the end */
    return escaped_first | (~backslashes & ((from_even & ~even) | (from_odd & even)));
}

/* Return a bit for each of 64 bytes, from two vectors with the bytes 0 and 255. */
AVX2 static inline uint64_t bits(__m256i low, __m256i high)
{
    return (uint32_t)_mm256_movemask_epi8(low) | (uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32;
}

AVX2 static inline __m256i is_control(__m256i signs)
{
    return _mm256_cmpeq_epi8(_mm256_min_epu8(signs, _mm256_set1_epi8(0x1f)), signs);
}

/* Find the bytes that are no second byte of an escape of two: not one of "\/bfnrt.
 *
 * Both halves of a byte are looked up, with a bit for each upper half that occurs: 1 is 2, 2 is 5, 4 is 6 and 8 is 7.
 */
AVX2 static inline __m256i is_no_short_escape(__m256i signs)
{
    const __m256i lower = _mm256_setr_epi8(0, 0, 13, 0, 8, 0, 4, 0, 0, 0, 0, 0, 2, 0, 4, 1,
                                           0, 0, 13, 0, 8, 0, 4, 0, 0, 0, 0, 0, 2, 0, 4, 1);
    const __m256i upper = _mm256_setr_epi8(0, 0, 1, 0, 0, 2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0,
                                           0, 0, 1, 0, 0, 2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i upper_halves = _mm256_and_si256(_mm256_srli_epi16(signs, 4), _mm256_set1_epi8(0x0f));
    const __m256i both = _mm256_and_si256(_mm256_shuffle_epi8(lower, signs), _mm256_shuffle_epi8(upper, upper_halves));
    return _mm256_cmpeq_epi8(both, _mm256_setzero_si256());
}

/* Do the same with 64 bytes at once. Escapes of two bytes, one in a hundred bytes of prose, need no branch. */
AVX2 static const byte *string_end_avx2(const byte *at, const byte *end)
{
    const __m256i quote = _mm256_set1_epi8('"'), backslash = _mm256_set1_epi8('\\');
    uint64_t carried = 0;
    while (end - at >= 64) {
        const __m256i low = _mm256_loadu_si256((const __m256i *)at);
        const __m256i high = _mm256_loadu_si256((const __m256i *)(at + 32));
        const uint64_t quotes = bits(_mm256_cmpeq_epi8(low, quote), _mm256_cmpeq_epi8(high, quote));
        const uint64_t backslashes = bits(_mm256_cmpeq_epi8(low, backslash), _mm256_cmpeq_epi8(high, backslash));
        const uint64_t controls = bits(is_control(low), is_control(high));
        const uint64_t not_short = bits(is_no_short_escape(low), is_no_short_escape(high));
        const uint64_t escaped = escaped_places(backslashes, &carried);
        const uint64_t stops = (quotes & ~escaped) | (escaped & not_short) | controls;
        if (!stops) {
            at += 64;
            continue;
        }
        at += __builtin_ctzll(stops);
        if (*at == '"')
            return at;
        const Py_ssize_t length = *at == 'u' ? escape_length(at - 1, end) : 0;
        if (!length)
            return NULL;
        at += length - 1;
        carried = 0;
    }
    return string_end_anywhere(at - carried, end);
}
#endif

/* Chosen by the processor when the module is loaded. */
static const byte *(*string_end)(const byte *at, const byte *end) = string_end_anywhere;

/* Return where the first `kept` bytes of a longer, well-formed string end, or a few bytes later, outside of an escape. */
static const byte *kept_end(const byte *text, const byte *end, Py_ssize_t kept)
{
    const byte *at = text;
    while (at - text < kept)
        at += *at != '\\' ? 1 : escape_length(at, end);
    return at;
}

/* Return true if a string with this first byte may begin with `ms:` or `fileid:`, in any letter case or as escapes. */
static inline int may_name(byte first)
{
    return (first | 0x20) == 'm' || (first | 0x20) == 'f' || first == '\\' || first == ' ';
}

/* Append a cut; return -1 without memory. */
static int add_cut(Cuts *cuts, Py_ssize_t at, Py_ssize_t removed)
{
    if (cuts->count == cuts->room) {
        const Py_ssize_t room = cuts->room ? 4 * cuts->room : 16;
        Cut *more = PyMem_Realloc(cuts->cuts, (size_t)room * sizeof(Cut));
        if (more == NULL)
            return -1;
        cuts->cuts = more;
        cuts->room = room;
    }
    cuts->cuts[cuts->count++] = (Cut){at, removed};
    return 0;
}

/* Find the cuts of a text. Return 1 if there are some, 0 if there are too few or the text is odd, -1 without memory. */
static int find_cuts(const byte *text, const byte *end, Cuts *cuts)
{
    Py_ssize_t depth = 0, removed = 0;
    const byte *at = text, *tried = text + Py_MAX(TRIED_BYTES, (end - text) / 8);
    while (at < end) {
        if (at >= tried) {
            if (removed < (at - text) / 8)
                return 0;
            tried = end;
        }
        const byte sign = *at++;
        if (sign == '{' || sign == '[')
            depth++;
        else if (sign == '}' || sign == ']')
            depth--;
        else if (sign == '"') {
            const byte *stop = string_end(at, end);
            if (stop == NULL)
                return 0;
            if (stop - at >= (depth > 1 ? LONG_BYTES : LONG_MEMBER_BYTES)) {
                const Py_ssize_t kept = depth <= 1 ? KEPT_BYTES : may_name(*at) ? KEPT_OF_NAME_BYTES : 0;
                const byte *from = kept_end(at, stop, kept);
                const Py_ssize_t short_at = (from - text) - removed;
                removed += stop - from;
                if (add_cut(cuts, short_at, removed) < 0)
                    return -1;
            }
            at = stop + 1;
        }
    }
    return cuts->count > 0;
}

/* Copy the text without what the cuts remove. */
static PyObject *without_cuts(const byte *text, Py_ssize_t length, const Cuts *cuts)
{
    PyObject *made = PyBytes_FromStringAndSize(NULL, length - cuts->cuts[cuts->count - 1].removed);
    if (made == NULL)
        return NULL;
    char *to = PyBytes_AS_STRING(made);
    Py_ssize_t at = 0, removed = 0;
    for (Py_ssize_t i = 0; i < cuts->count; i++) {
        memcpy(to + at, text + at + removed, (size_t)(cuts->cuts[i].at - at));
        at = cuts->cuts[i].at;
        removed = cuts->cuts[i].removed;
    }
    memcpy(to + at, text + at + removed, (size_t)(PyBytes_GET_SIZE(made) - at));
    return made;
}

PyDoc_STRVAR(shorten_doc,
"shorten(body)\n--\n\n"
"Return the short text and the packed cuts; None if nothing is worth cutting, or the text is odd.");

static PyObject *shorten(PyObject *Py_UNUSED(module), PyObject *body)
{
    Py_buffer view;
    if (PyObject_GetBuffer(body, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    Cuts cuts = {NULL, 0, 0};
    PyObject *result = NULL;
    const byte *text = view.buf;
    const int found = find_cuts(text, text + view.len, &cuts);
    if (found > 0) {
        PyObject *made = without_cuts(text, view.len, &cuts);
        if (made != NULL)
            result = Py_BuildValue("Ny#", made, (const char *)cuts.cuts, cuts.count * (Py_ssize_t)sizeof(Cut));
    }
    else if (found < 0)
        PyErr_NoMemory();
    else
        result = Py_NewRef(Py_None);
    PyMem_Free(cuts.cuts);
    PyBuffer_Release(&view);
    return result;
}

/* Return how many bytes were removed before offset `at` of the short text. */
static Py_ssize_t removed_before(const Cut *cuts, Py_ssize_t count, Py_ssize_t at)
{
    Py_ssize_t low = 0, high = count;
    while (low < high) {
        const Py_ssize_t middle = low + (high - low) / 2;
        if (cuts[middle].at < at)
            low = middle + 1;
        else
            high = middle;
    }
    return low ? cuts[low - 1].removed : 0;
}

PyDoc_STRVAR(whole_doc,
"whole(body, short, cuts, part)\n--\n\n"
"Return the slice of the memoryview `body` of which `part`, a view into `short`, is the short form.\n\n"
"Raises ValueError if `part` is not a view into `short`, or the cuts are not those of `body`.");

static PyObject *whole(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "whole takes four arguments");
        return NULL;
    }
    if (!PyMemoryView_Check(args[0]) || !PyBytes_Check(args[1]) || !PyBytes_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "whole takes a memoryview, bytes, bytes and a view");
        return NULL;
    }
    Py_buffer part;
    if (PyObject_GetBuffer(args[3], &part, PyBUF_SIMPLE) < 0)
        return NULL;
    const uintptr_t base = (uintptr_t)PyBytes_AS_STRING(args[1]), place = (uintptr_t)part.buf;
    const Py_ssize_t size = PyBytes_GET_SIZE(args[1]), length = part.len;
    PyBuffer_Release(&part);
    if (place < base || place - base > (uintptr_t)size || length > size - (Py_ssize_t)(place - base)) {
        PyErr_SetString(PyExc_ValueError, "the part does not lie in the short text");
        return NULL;
    }
    const Cut *cuts = (const Cut *)PyBytes_AS_STRING(args[2]);
    const Py_ssize_t count = PyBytes_GET_SIZE(args[2]) / (Py_ssize_t)sizeof(Cut);
    const Py_ssize_t start = (Py_ssize_t)(place - base), stop = start + length;
    return PySequence_GetSlice(args[0], start + removed_before(cuts, count, start),
                               stop + removed_before(cuts, count, stop));
}

static PyMethodDef methods[] = {
    {"shorten", shorten, METH_O, shorten_doc},
    {"whole", (PyCFunction)(void (*)(void))whole, METH_FASTCALL, whole_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "cairn_json_cuts", "Shorten JSON text for a decoder.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_cairn_json_cuts(void)
{
#if defined(WITH_AVX2)
    if (__builtin_cpu_supports("avx2"))
        string_end = string_end_avx2;
#endif
    return PyModuleDef_Init(&module);
}
