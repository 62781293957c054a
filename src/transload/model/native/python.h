/* Functions that Python calls as it calls its own, in some 50 ns: a call through ctypes takes ten times as long.

Owns the little of Python that this takes, all of its stable interface. It comes as addresses from structs.py, so that
neither building nor loading the kernels needs Python. Whoever calls these functions holds the interpreter's lock. */

#ifndef TRANSLOAD_PYTHON_H
#define TRANSLOAD_PYTHON_H

typedef struct object object; /* PyObject: never looked into */

static struct python {
    void *(*as_address)(object *);
    long long (*as_integer)(object *);
    double (*as_number)(object *);
    int (*as_bytes)(object *, char **, intptr_t *);
    object *(*error)(void);
    void (*set_error)(object *, const char *);
    object *(*integer)(long long);
    object *(*boolean)(long);
    object *(*number)(double);
    object *(*bytes)(const char *, intptr_t);
    object *(*tuple)(intptr_t);
    int (*set_item)(object *tuple, intptr_t, object *); /* the item, which may be NULL, is the tuple's from now on */
    void (*drop)(object *);
    void *(*unlock)(void);
    void (*lock)(void *);
    object *assertion_error;
} python;

struct method {
    const char *name;
    void *call;
    int flags;
    const char *explanation;
};
#define NO_ARGUMENTS 0x04 /* METH_NOARGS: call(self, NULL) */
#define ARGUMENTS 0x80    /* METH_FASTCALL: call(self, arguments, their number) */

void transload_use_python(const struct python *given) { python = *given; }

/* For our own bugs. */
static object *wrong(const char *what) {
    if (!python.error()) python.set_error(python.assertion_error, what);
    return NULL;
}

#endif
