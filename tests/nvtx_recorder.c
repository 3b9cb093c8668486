/* Hears NVTX without a GPU or a profiler: what an NVTX tool attaches to, written down.
 *
 * A process started with NVTX_INJECTION64_PATH naming this library hands it every NVTX call.
 * Each becomes one line of JSON in the file that NVTX_RECORD names:
 *   {"kind", "pid", "tid", "ns", "domain", "category", "message"}
 * with kind domain, category, string, push or pop. Messages in wide characters are null;
 * marks and start/end ranges are not recorded.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "nvtx3/nvToolsExt.h"

typedef struct Category {
    uint32_t id;
    char *name;
    struct Category *next;
} Category;

typedef struct {
    char *name;
    Category *categories;
} Domain;

static Domain default_domain = {"", NULL};
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int out = -1;

static Domain *domain_of(nvtxDomainHandle_t handle) {
    return handle ? (Domain *)handle : &default_domain;
}

/* Writes `text` as a JSON string, cut short where `end` comes first. */
static char *quoted(char *to, const char *end, const char *text) {
    if (!text) return to + snprintf(to, (size_t)(end - to), "null");
    *to++ = '"';
    for (; *text && to < end - 8; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            *to++ = '\\';
            *to++ = (char)c;
        } else if (c < 0x20) {
            to += snprintf(to, 8, "\\u%04x", c);
        } else {
            *to++ = (char)c;
        }
    }
    *to++ = '"';
    return to;
}

static void put(const char *kind, const char *domain, const char *category, const char *message) {
    char line[8192], *to = line;
    const char *end = line + sizeof line - 64; /* room for the keys that follow */
    struct timespec now;
    if (out < 0) return;
    clock_gettime(CLOCK_MONOTONIC, &now);
    to += snprintf(to, 256, "{\"kind\": \"%s\", \"pid\": %d, \"tid\": %ld, \"ns\": %lld, \"domain\": ",
                   kind, (int)getpid(), (long)syscall(SYS_gettid),
                   (long long)now.tv_sec * 1000000000LL + now.tv_nsec);
    to = quoted(to, line + 2048, domain);
    to += snprintf(to, 32, ", \"category\": ");
    to = quoted(to, line + 4096, category);
    to += snprintf(to, 32, ", \"message\": ");
    to = quoted(to, end, message);
    to += snprintf(to, 8, "}\n");
    /* One write to a file opened for appending, so that lines of several processes stay whole. */
    if (write(out, line, (size_t)(to - line)) != to - line) {
        perror("nvtx_recorder: write");
        abort();
    }
}

static const char *category_name(Domain *domain, uint32_t id) {
    const char *name = NULL;
    pthread_mutex_lock(&lock);
    for (Category *c = domain->categories; c; c = c->next)
        if (c->id == id) name = c->name;
    pthread_mutex_unlock(&lock);
    return name;
}

static nvtxDomainHandle_t domain_create(const char *name) {
    Domain *domain = calloc(1, sizeof *domain);
    domain->name = strdup(name);
    put("domain", name, NULL, NULL);
    return (nvtxDomainHandle_t)domain;
}

static void name_category(nvtxDomainHandle_t handle, uint32_t id, const char *name) {
    Domain *domain = domain_of(handle);
    Category *category = calloc(1, sizeof *category);
    category->id = id;
    category->name = strdup(name);
    pthread_mutex_lock(&lock);
    category->next = domain->categories;
    domain->categories = category;
    pthread_mutex_unlock(&lock);
    put("category", domain->name, name, NULL);
}

static nvtxStringHandle_t register_string(nvtxDomainHandle_t handle, const char *string) {
    put("string", domain_of(handle)->name, NULL, string);
    return (nvtxStringHandle_t)strdup(string);
}

static int push(nvtxDomainHandle_t handle, const nvtxEventAttributes_t *event) {
    const char *message = NULL;
    if (event->messageType == NVTX_MESSAGE_TYPE_ASCII) message = event->message.ascii;
    if (event->messageType == NVTX_MESSAGE_TYPE_REGISTERED)
        message = (const char *)event->message.registered;
    Domain *domain = domain_of(handle);
    put("push", domain->name, category_name(domain, event->category), message);
    return NVTX_NO_PUSH_POP_TRACKING;
}

static int pop(nvtxDomainHandle_t handle) {
    put("pop", domain_of(handle)->name, NULL, NULL);
    return NVTX_NO_PUSH_POP_TRACKING;
}

/* The calls that name no domain: torch.cuda.nvtx uses them. */
static int push_default(const nvtxEventAttributes_t *event) { return push(NULL, event); }
static int pop_default(void) { return pop(NULL); }
static int push_default_ascii(const char *message) {
    put("push", "", NULL, message);
    return NVTX_NO_PUSH_POP_TRACKING;
}

static void attach(NvtxFunctionTable table, unsigned size, unsigned id, void *function) {
    if (id < size && table[id]) *table[id] = (NvtxFunctionPointer)function;
}

/* NVTX calls this once for each library in the process that was built with its headers. */
__attribute__((visibility("default"))) int
InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_export_table) {
    const char *path = getenv("NVTX_RECORD");
    NvtxFunctionTable table = NULL;
    unsigned size = 0;
    const NvtxExportTableCallbacks *callbacks = get_export_table(NVTX_ETID_CALLBACKS);
    if (!path || !callbacks) return 0;
    pthread_mutex_lock(&lock);
    if (out < 0) out = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    pthread_mutex_unlock(&lock);
    if (out < 0) {
        perror("nvtx_recorder: NVTX_RECORD");
        return 0;
    }
    if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size)) return 0;
    attach(table, size, NVTX_CBID_CORE2_DomainCreateA, (void *)domain_create);
    attach(table, size, NVTX_CBID_CORE2_DomainNameCategoryA, (void *)name_category);
    attach(table, size, NVTX_CBID_CORE2_DomainRegisterStringA, (void *)register_string);
    attach(table, size, NVTX_CBID_CORE2_DomainRangePushEx, (void *)push);
    attach(table, size, NVTX_CBID_CORE2_DomainRangePop, (void *)pop);
    if (!callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size)) return 0;
    attach(table, size, NVTX_CBID_CORE_RangePushEx, (void *)push_default);
    attach(table, size, NVTX_CBID_CORE_RangePushA, (void *)push_default_ascii);
    attach(table, size, NVTX_CBID_CORE_RangePop, (void *)pop_default);
    return 1;
}
