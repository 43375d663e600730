/* Green contexts, streams with priorities, pinned memory: a part of standin.c.
 *
 * STANDIN_SMS: how many multiprocessors (132). STANDIN_SM_GROUP: "8 8", the least that may be split
 * off and what a count must be a multiple of. STANDIN_GREEN_FAULT: "NAME CODE", that call is refused.
 * The GPU's UUID is that which CUDA_VISIBLE_DEVICES shows, if it shows one.
 * standinGreen(0): green contexts that live; 1: contexts made; 2: streams that live, of contexts and
 * with priorities; 3: bytes of pinned memory.
 */
enum { SMS_MOST = 256, MADE_MOST = 256, BAD_TYPE = 914, BAD_CONFIG = 915, BAD_CONTEXT = 201, SM_TYPE = 1 };

struct sms { unsigned count, least, multiple, flags, locality; };
struct resource { int type; uint32_t split; unsigned char has[SMS_MOST / 8]; char rest[92 - 4 - SMS_MOST / 8];
                  struct sms sm; char left[40 - sizeof(struct sms)]; void *next; };
_Static_assert(sizeof(struct resource) == 144, "as cuda.h has it");
struct green { struct resource of; int lives; };
static struct green greens[MADE_MOST];
static struct resource descriptors[MADE_MOST];
static struct { struct stream *stream; struct green *of; int priority; } laid[MADE_MOST];
static struct { void *at; size_t n; } pinned[MADE_MOST];
static int greens_made, descriptors_made, laid_made;
static uint32_t splits;
static uint64_t pinned_bytes;

static int refused(const char *name)
{
    char which[64] = "";
    int code = OK;
    const char *fault = getenv("STANDIN_GREEN_FAULT");
    if (fault && sscanf(fault, "%63s %d", which, &code) == 2 && !strcmp(which, name))
        return code;
    return OK;
}

static void settle(struct resource *r)
{
    r->type = SM_TYPE;
    r->sm.count = 0;
    for (int i = 0; i < SMS_MOST; i++)
        r->sm.count += (r->has[i / 8] >> i % 8) & 1;
    r->sm.least = 8, r->sm.multiple = 8;
    const char *group = getenv("STANDIN_SM_GROUP");
    if (group)
        sscanf(group, "%u %u", &r->sm.least, &r->sm.multiple);
}

EXPORT int cuDeviceGetDevResource(int d, struct resource *r, int type)
{
    int state = refused("cuDeviceGetDevResource");
    const char *sms = getenv("STANDIN_SMS");
    int count = sms ? atoi(sms) : 132;
    if (state || d || type != SM_TYPE)
        return state ? state : d ? 101 : BAD_TYPE;
    memset(r, 0, sizeof *r);
    for (int i = 0; i < count && i < SMS_MOST; i++)
        r->has[i / 8] |= (unsigned char)(1 << i % 8);
    settle(r);
    return OK;
}

static void green_take(struct resource *from, struct resource *to, unsigned count)
{
    for (int i = 0; i < SMS_MOST && count; i++)
        if ((from->has[i / 8] >> i % 8) & 1) {
            from->has[i / 8] &= (unsigned char)~(1 << i % 8);
            to->has[i / 8] |= (unsigned char)(1 << i % 8);
            count--;
        }
}

EXPORT int cuDevSmResourceSplitByCount(struct resource *out, unsigned *groups, const struct resource *in,
                                       struct resource *rest, unsigned flags, unsigned count)
{
    int state = refused("cuDevSmResourceSplitByCount");
    if (state || !groups || !in || in->type != SM_TYPE || in->split || flags > 3 || count > in->sm.count)
        return state ? state : INVALID;
    unsigned least = flags & 1 ? 2 : in->sm.least, multiple = flags & 1 ? 2 : in->sm.multiple;
    count = count < least ? least : count;
    count = (count + multiple - 1) / multiple * multiple;
    unsigned most = in->sm.count / count;
    if (!out) {
        *groups = most;
        return OK;
    }
    struct resource left = *in;
    left.split = ++splits;
    *groups = *groups < most ? *groups : most;
    for (unsigned i = 0; i < *groups; i++) {
        memset(&out[i], 0, sizeof out[i]);
        out[i].split = left.split;
        green_take(&left, &out[i], count);
        settle(&out[i]);
    }
    settle(&left);
    if (rest)
        *rest = left;
    return OK;
}

EXPORT int cuDevResourceGenerateDesc(void **made, const struct resource *of, unsigned n)
{
    int state = refused("cuDevResourceGenerateDesc");
    if (state || !of || !n)
        return state ? state : INVALID;
    struct resource all = of[0];
    for (unsigned i = 1; i < n; i++) {
        if (of[i].split != of[0].split || !of[i].split)
            return BAD_CONFIG;
        for (int j = 0; j < SMS_MOST / 8; j++) {
            if (all.has[j] & of[i].has[j])
                return BAD_CONFIG;
            all.has[j] |= of[i].has[j];
        }
    }
    settle(&all);
    if (descriptors_made == MADE_MOST || !all.sm.count)
        return BAD_CONFIG;
    descriptors[descriptors_made] = all;
    *made = &descriptors[descriptors_made++];
    return OK;
}

EXPORT int cuGreenCtxCreate(void **made, void *descriptor, int d, unsigned flags)
{
    int state = refused("cuGreenCtxCreate");
    if (state || !initialized || !descriptor || d || flags != 1)
        return state ? state : initialized ? INVALID : 3;
    if (greens_made == MADE_MOST)
        return NO_MEMORY;
    struct green *g = &greens[greens_made++];
    g->of = *(struct resource *)descriptor;
    g->lives = 1;
    *made = g;
    return OK;
}
EXPORT int cuGreenCtxDestroy(void *h)
{
    struct green *g = h;
    if (!g->lives)
        return BAD_CONTEXT;
    g->lives = 0;
    return OK;
}
EXPORT int cuGreenCtxGetDevResource(void *h, struct resource *r, int type)
{
    struct green *g = h;
    int state = refused("cuGreenCtxGetDevResource");
    if (state || !g->lives || type != SM_TYPE)
        return state ? state : g->lives ? BAD_TYPE : BAD_CONTEXT;
    *r = g->of;
    r->split = 0;
    return OK;
}
EXPORT int cuCtxFromGreenCtx(void **c, void *h) { *c = &primary; return ((struct green *)h)->lives ? OK : BAD_CONTEXT; }

static int lay(void **made, struct green *of, unsigned flags, int priority)
{
    if (flags != 1 || laid_made == MADE_MOST)
        return INVALID;
    laid[laid_made].stream = make_stream();
    laid[laid_made].of = of;
    laid[laid_made].priority = priority < -5 ? -5 : priority > 0 ? 0 : priority;
    *made = laid[laid_made++].stream;
    return OK;
}
EXPORT int cuGreenCtxStreamCreate(void **s, void *h, unsigned flags, int priority)
{
    int state = refused("cuGreenCtxStreamCreate");
    if (state || !((struct green *)h)->lives)
        return state ? state : BAD_CONTEXT;
    return lay(s, h, flags, priority);
}
EXPORT int cuStreamCreateWithPriority(void **s, unsigned flags, int priority)
{
    int state = enter();
    return state ? state : lay(s, NULL, flags, priority);
}
EXPORT int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return enter(); }
EXPORT int cuStreamGetPriority(void *h, int *priority)
{
    *priority = 0;
    for (int i = 0; i < laid_made; i++)
        if (laid[i].stream == h)
            *priority = laid[i].priority;
    return OK;
}
EXPORT int cuStreamGetDevResource(void *h, struct resource *r, int type)
{
    for (int i = 0; i < laid_made; i++)
        if (laid[i].stream == h && laid[i].of)
            return cuGreenCtxGetDevResource(laid[i].of, r, type);
    return cuDeviceGetDevResource(0, r, type);
}

EXPORT int cuMemHostAlloc(void **at, size_t n, unsigned flags)
{
    int state = enter();
    (void)flags;
    for (int i = 0; i < MADE_MOST && !state && n; i++)
        if (!pinned[i].at) {
            *at = pinned[i].at = calloc(1, n);
            pinned[i].n = n;
            pinned_bytes += n;
            return OK;
        }
    return state ? state : n ? NO_MEMORY : INVALID;
}
EXPORT int cuMemFreeHost(void *at)
{
    for (int i = 0; i < MADE_MOST; i++)
        if (at && pinned[i].at == at) {
            free(at);
            pinned_bytes -= pinned[i].n;
            pinned[i].at = NULL;
            return OK;
        }
    return INVALID;
}
EXPORT int cuDeviceGetUuid_v2(unsigned char *at, int d)
{
    const char *shown = getenv("CUDA_VISIBLE_DEVICES");
    for (int i = 0; i < 16; i++)
        at[i] = (unsigned char)(i + 1);
    if (shown && !strncmp(shown, "GPU-", 4))
        for (int i = 0; i < 16 && shown; i++) {
            shown += strspn(shown, "GPU-");
            if (sscanf(shown, "%2hhx", &at[i]) == 1)
                shown += 2;
        }
    return d ? 101 : OK;
}

/* For tests, not of the driver. */
EXPORT uint64_t standinGreen(int what)
{
    uint64_t greens_alive = 0, streams_alive = 0;
    for (int i = 0; i < greens_made; i++)
        greens_alive += (uint64_t)greens[i].lives;
    for (int i = 0; i < laid_made; i++)
        streams_alive += !laid[i].stream->ending;
    switch (what) {
    case 0: return greens_alive;
    case 1: return (uint64_t)greens_made;
    case 2: return streams_alive;
    case 3: return pinned_bytes;
    default: return 0;
    }
}
