"""Made-up secrets and decoys, each with its kind and place, in the contexts that they occur in.

Everything is generated from a seed: nothing here was ever valid. Forms are those of the issuers
(prefix, alphabet, length, GitHub's checksum).
"""

import base64
import random
import string
import zlib
from typing import NamedTuple

from tests.assets.secret_decoys import DECOYS

ALNUM = string.ascii_letters + string.digits
UPPER = string.ascii_uppercase + "234567"
HEXES = "0123456789abcdef"
URLSAFE = ALNUM + "-_"
EACH = 40


class Sample(NamedTuple):
    """A text; `secret` is what to find in it, or "" where nothing is; `kind` is its kind."""

    text: str
    secret: str
    kind: str


def chars(rng, alphabet, count):
    return "".join(rng.choices(alphabet, k=count))


def base62(number, width):
    digits = string.digits + string.ascii_uppercase + string.ascii_lowercase
    made = ""
    while number:
        number, rest = divmod(number, 62)
        made = digits[rest] + made
    return made.rjust(width, "0")


def checksummed(rng, prefix):
    body = chars(rng, ALNUM, 30)
    return f"{prefix}{body}{base62(zlib.crc32(body.encode()), 6)}"


def b64(data, pad=True):
    made = base64.urlsafe_b64encode(data).decode()
    return made if pad else made.rstrip("=")


def email(rng):
    names = "ada bob.smith c_jones dave+list e.f.g maria-lopez x9 Hans.Mueller j0hn".split()
    domains = (
        "corp-mail.com uni-bonn.de mail.acme.co.uk gmail.com inria.fr startup.io nasa.gov".split()
    )
    return f"{rng.choice(names)}{rng.choice(['', '7', '42'])}@{rng.choice(domains)}"


def ipv4(rng):
    first = rng.choice([5, 23, 37, 45, 52, 66, 77, 81, 93, 104, 128, 134, 151, 185, 194, 212])
    return f"{first}.{rng.randrange(1, 255)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"


def ipv6(rng):
    first = rng.choice(["2001:4860", "2606:4700", "2a00:1450", "2a03:2880", "2620:fe", "2400:cb00"])
    rest = [f"{rng.randrange(1, 65536):x}" for _ in range(6)]
    return f"{first}:{':'.join(rest)}" if rng.random() < 0.5 else f"{first}:{rest[0]}::{rest[1]}"


def jwt(rng):
    head = b64(b'{"alg":"HS256","typ":"JWT"}', pad=False)
    body = b64(b'{"sub":"%d","iat":%d}' % (rng.getrandbits(40), rng.getrandbits(30)), pad=False)
    return f"{head}.{body}.{b64(rng.randbytes(32), pad=False)}"


def azure(rng):
    kind = rng.randrange(3)
    if kind == 0:
        return chars(rng, ALNUM, 3) + chars(rng, string.digits, 1) + "Q~" + chars(rng, URLSAFE, 34)
    return base64.b64encode(rng.randbytes(64 if kind == 1 else 32)).decode()


def openai(rng):
    if rng.random() < 0.5:
        return f"sk-{chars(rng, ALNUM, 20)}T3BlbkFJ{chars(rng, ALNUM, 20)}"
    return f"sk-proj-{chars(rng, URLSAFE, 74)}T3BlbkFJ{chars(rng, URLSAFE, 74)}"


def slack(rng):
    digits = [chars(rng, string.digits, 12) for _ in range(2)]
    if rng.random() < 0.7:
        return f"xox{rng.choice('bp')}-{digits[0]}-{digits[1]}-{chars(rng, ALNUM, 24)}"
    return f"xapp-1-A{chars(rng, UPPER, 10)}-{digits[0]}-{chars(rng, HEXES, 64)}"


def gcp(rng):
    return rng.choice(
        [f"AIzaSy{chars(rng, URLSAFE, 33)}", f"GOCSPX-{chars(rng, URLSAFE, 28)}"]
    ).rstrip("-_") or gcp(rng)


def secret(rng):
    shape = rng.randrange(5)
    if shape == 0:
        return chars(rng, HEXES, rng.choice([32, 40, 64]))
    if shape == 1:
        return base64.b64encode(rng.randbytes(30)).decode()
    return chars(rng, [ALNUM, string.ascii_lowercase + string.digits, URLSAFE][shape - 2], 32)


def password(rng):
    words = "Tiger summer Kaffee blue42 monkey Dragon x7 winter Qw Berlin rover".split()
    tail = chars(rng, string.digits, rng.randrange(2, 5)) + rng.choice(
        ["", "!", "#", "@", "*", "?"]
    )
    return f"{rng.choice(words)}{rng.choice(['', '_', '-', '.'])}{rng.choice(words)}{tail}"


PREFIXED = {
    "email": email,
    "ipv4": ipv4,
    "ipv6": ipv6,
    "aws": lambda rng: rng.choice(["AKIA", "ASIA"]) + chars(rng, UPPER, 16),
    "gcp": lambda rng: f"AIzaSy{chars(rng, URLSAFE, 32)}{chars(rng, ALNUM, 1)}",
    "github": lambda rng: (
        checksummed(rng, rng.choice(["ghp_", "gho_", "ghs_", "ghu_"]))
        if rng.random() < 0.7
        else f"github_pat_{chars(rng, ALNUM, 22)}_{chars(rng, ALNUM, 59)}"
    ),
    "gitlab": lambda rng: f"glpat-{chars(rng, URLSAFE, 19)}{chars(rng, ALNUM, 1)}",
    "huggingface": lambda rng: f"hf_{chars(rng, string.ascii_letters, 34)}",
    "openai": openai,
    "anthropic": lambda rng: f"sk-ant-api03-{chars(rng, URLSAFE, 93)}AA",
    "slack": slack,
    "stripe": lambda rng: (
        f"{rng.choice('sr')}k_{rng.choice(['live', 'test'])}_{chars(rng, ALNUM, 24)}"
    ),
    "npm": lambda rng: checksummed(rng, "npm_"),
    "pypi": lambda rng: f"pypi-AgEIcHlwaS5vcmc{chars(rng, URLSAFE, 130)}",
    "jwt": jwt,
}
# %s is the secret. Anything with a prefix is found wherever it stands.
ANYWHERE = (
    "Use %s to get in.\n",
    "it was %s.",
    "(%s)",
    'VALUE = "%s"\n',
    "value = '%s'  # old\n",
    'client = Client(value="%s", timeout=3)\n',
    '{"value": "%s", "n": 1}\n',
    '"{\\"value\\": \\"%s\\"}"',
    "value: %s\n",
    "VALUE=%s\n",
    "export VALUE=%s\nmake\n",
    "2026-01-02T10:00:01Z INFO user=%s status=200\n",
    "- `%s`\n",
    "# %s\n",
    "a,%s,b\n",
    "<value>%s</value>",
    "print('first\\n%s\\nlast')\n",
    "['%s', 'x']",
    "tool --value %s --dry-run\n",
    "%s",
)
ASSIGNED = (
    '%(name)s = "%(value)s"\n',
    "%(name)s = '%(value)s'  # prod\n",
    'client = Client(%(name)s="%(value)s", timeout=3)\n',
    '{"%(name)s": "%(value)s", "n": 1}\n',
    '"{\\"%(name)s\\": \\"%(value)s\\"}"',
    "%(name)s: %(value)s\nname: x\n",
    '%(name)s: "%(value)s"\n',
    "%(NAME)s=%(value)s\n",
    "export %(NAME)s=%(value)s\n",
    '%(NAME)s: str = "%(value)s"\n',
    'os.environ["%(NAME)s"] = "%(value)s"\n',
    'os.getenv("%(NAME)s", "%(value)s")\n',
    "<%(name)s>%(value)s</%(name)s>",
    "tool --%(name)s %(value)s --dry-run\n",
    "tool --%(name)s=%(value)s\n",
    'const %(name)s = "%(value)s";\n',
    '%(name)s => "%(value)s",\n',
    "%(name)s := `%(value)s`\n",
    "WARN %(name)s=%(value)s user=7\n",
    '  "%(name)s" : "%(value)s"\n',
)
PASSWORD_NAMES = "password db_password passwd smtp_pass pwd userPassword DB_PASS passphrase".split()
SECRET_NAMES = (
    "api_key secret_key client_secret access_token apiKey auth_token aws_secret_access_key "
    "webhook_secret SECRET_KEY_BASE encryption_key"
).split()


def positives(seed=7):
    """Return EACH samples of every kind."""
    rng, made = random.Random(seed), []
    for kind, generate in PREFIXED.items():
        for number in range(EACH):
            value = generate(rng)
            made.append(Sample(ANYWHERE[number % len(ANYWHERE)] % value, value, kind))
    for kind, generate, names in (
        ("password", password, PASSWORD_NAMES),
        ("secret", secret, SECRET_NAMES),
    ):
        for number in range(2 * EACH):
            value, name = generate(rng), names[number % len(names)]
            context = ASSIGNED[number % len(ASSIGNED)]
            text = context % {"name": name, "NAME": name.upper(), "value": value}
            made.append(Sample(text, value, kind))
    for number in range(EACH):
        made += [_pem(rng, number), _url(rng, number), _azure(rng, number)]
    return made


def _pem(rng, number):
    kind = rng.choice(["RSA ", "EC ", "OPENSSH ", "", "ENCRYPTED "])
    body = base64.b64encode(rng.randbytes(rng.choice([121, 609]))).decode()
    lines = [body[i : i + 64] for i in range(0, len(body), 64)]
    joint = ["\n", "\\n", '\\n"\n    "'][number % 3]
    block = joint.join(
        [f"-----BEGIN {kind}PRIVATE KEY-----", *lines, f"-----END {kind}PRIVATE KEY-----"]
    )
    text = ["%s\n", 'key = "%s"\n', 'KEY = (\n    "%s"\n)\n'][number % 3] % block
    return Sample(text, joint.join(lines), "pem")


def _url(rng, number):
    value = password(rng).replace("@", "x").replace("#", "y").replace("?", "z")
    scheme = ["postgres", "https", "redis", "amqp", "mysql+pymysql", "ftp"][number % 6]
    text = [
        'url = "%s://%s:%s@%s/x"\n',
        "DATABASE_URL=%s://%s:%s@%s/app\n",
        "see %s://%s:%s@%s now",
    ][number % 3]
    host = rng.choice(["db.corp.net:5432", "10.0.0.7", "cache.internal", "h.example.com"])
    return Sample(
        text % (scheme, rng.choice(["app", "bob", "svc"]), value, host), value, "url_credentials"
    )


def _azure(rng, number):
    value = azure(rng)
    if "Q~" in value:
        return Sample(ANYWHERE[number % len(ANYWHERE)] % value, value, "azure")
    name = "AccountKey" if len(value) > 50 else "SharedAccessKey"
    text = f'conn = "Endpoint=x;{name}={value};Suffix=core.windows.net"\n'
    return Sample(text, value, "azure")


def decoys(seed=11, count=5):
    """Return `count` samples of every decoy, with other numbers and in other places."""
    rng, made = random.Random(seed), []
    frames = ("%s\n", "# %s\n", "see: %s\n", "x = 1\n%s\ny = 2\n", "> %s")
    for kind, texts in DECOYS.items():
        for text in texts:
            for number in range(count):
                values = {f"hex{n}": chars(rng, HEXES, n) for n in (16, 32, 40, 64)}
                values["b64"] = base64.b64encode(rng.randbytes(63)).decode()
                values["uuid"] = "-".join(chars(rng, HEXES, n) for n in (8, 4, 4, 4, 12))
                values["b"] = str(rng.randrange(1, 255))
                made.append(Sample(frames[number % 5] % (text % values), "", kind))
    return made
