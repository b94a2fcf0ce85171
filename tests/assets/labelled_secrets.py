"""Made-up secrets and decoys, each with its kind and place, in the contexts that they occur in.

Everything is generated from a seed: nothing here was ever valid. Forms are those of the issuers
(prefix, alphabet, length, GitHub's checksum).
"""

import base64
import random
import string
import zlib
from typing import NamedTuple

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
    domains = "corp-mail.com uni-bonn.de mail.acme.co.uk gmail.com inria.fr startup.io nasa.gov".split()
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
    tail = chars(rng, string.digits, rng.randrange(2, 5)) + rng.choice(["", "!", "#", "@", "*", "?"])
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
    "stripe": lambda rng: f"{rng.choice('sr')}k_{rng.choice(['live', 'test'])}_{chars(rng, ALNUM, 24)}",
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
    block = joint.join([f"-----BEGIN {kind}PRIVATE KEY-----", *lines, f"-----END {kind}PRIVATE KEY-----"])
    text = ["%s\n", 'key = "%s"\n', 'KEY = (\n    "%s"\n)\n'][number % 3] % block
    return Sample(text, joint.join(lines), "pem")


def _url(rng, number):
    value = password(rng).replace("@", "x").replace("#", "y").replace("?", "z")
    scheme = ["postgres", "https", "redis", "amqp", "mysql+pymysql", "ftp"][number % 6]
    text = ['url = "%s://%s:%s@%s/x"\n', "DATABASE_URL=%s://%s:%s@%s/app\n", "see %s://%s:%s@%s now"][
        number % 3
    ]
    host = rng.choice(["db.corp.net:5432", "10.0.0.7", "cache.internal", "h.example.com"])
    return Sample(text % (scheme, rng.choice(["app", "bob", "svc"]), value, host), value, "url_credentials")


def _azure(rng, number):
    value = azure(rng)
    if "Q~" in value:
        return Sample(ANYWHERE[number % len(ANYWHERE)] % value, value, "azure")
    name = "AccountKey" if len(value) > 50 else "SharedAccessKey"
    text = f'conn = "Endpoint=x;{name}={value};Suffix=core.windows.net"\n'
    return Sample(text, value, "azure")


DECOYS = {
    "email": (
        "@property\ndef size(self): ...", "@app.route('/x')\ndef x(): ...", "import x from '@angular/core'",
        "npm i react@18.2.0 lodash@4.17.21", "git clone git@github.com:org/repo.git",
        "mail me@example.com or you@example.org", "ssh root@localhost", "img/icon@2x.png 2x",
        "y = A@B.T + x@W.dot(v)", "image: repo/app@sha256:%(hex64)s", "ping root@10.0.0.1",
        "systemctl start getty@tty1.service", "aes256-gcm@openssh.com,chacha20-poly1305@openssh.com",
        "Thanks @alice, see @org/team.", "foo@bar", "x = model@self.weights.mean()",
        "user@host.local and a@b.internal", "yourname@yourcompany.com", "@media (min-width: 1px) { }",
        "def f(a, *, b): return a @ b.values", "pip install pkg@git+https://h.x/y", "~@!.com #@$%%.org",
    ),
    "ipv4": (
        "version 4.2.1.8 of it", "pkg==1.2.3.4", "10.%(b)s.%(b)s.1 gateway", "192.168.%(b)s.%(b)s",
        "127.0.0.1:8080 and 0.0.0.0", "mask 255.255.255.0", "see section 2.1.3.4 there",
        "Chrome/49.0.112.9 Safari", "OID 1.3.6.1.4.1.311", "app-1.12.3.40.tar.gz", "v3.14.15.92",
        'AssemblyVersion("12.0.33.5")', "203.0.113.%(b)s is for documentation", "198.51.100.%(b)s",
        "172.16.%(b)s.9", "169.254.%(b)s.2", "1.2.3.4", "300.%(b)s.1.2", "x = 1.5, 2.5, 3.5",
        "released 21.10.0.4rc1", "239.1.2.%(b)s multicast", "build 12.1.0.44", "1.2.3.4.5.6",
    ),
    "ipv6": (
        "x[a::2] + y[2001::2]", "std::vector<a::b>", "fe80::1%%eth0", "::1", "2001:db8::%(b)s",
        "12:34:56", "2026:01:02 10:11:12", "00:1b:44:11:3a:b7", "fd00:12:34::1", "a::b::c",
        "ff02::1:ff00:%(b)s", "lst[2000:3000:2]", "dict(a=1)[2024:]", "Foo::Bar::BAZ",
    ),
    "aws": (
        "AKIAIOSFODNN7EXAMPLE", "AKIAXXXXXXXXXXXXXXXX", "AKIA1234567890ABCDEF", "AKIA", "akia%(hex16)s",
        "MAKIAVELLIANCONSTANTS", "prefix = 'AKIA' + rest", "arn:aws:iam::123456789012:role/x",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "ASIA_PACIFIC_REGION_ONE",
    ),
    "gcp": (
        "AIzaSyYOUR_API_KEY_GOES_HERE_0000000000", "AIza...", "key=AIzaSyXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX",
        "GOCSPX-your-client-secret-goes-here-x", "startswith('AIza')",
    ),
    "azure": (
        "AccountKey=YOUR_KEY;EndpointSuffix=x", "AccountKey=${KEY}", "SharedAccessKey=...;", "sig=abc", "~Q~",
        "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/"
        "KBHBeksoGMGw==;",
    ),
    "github": (
        "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "ghp_YOUR_TOKEN", "${{ secrets.GITHUB_TOKEN }}",
        "github_pat_...", "graph_node_%(hex16)s", "ghp_%(hex16)s", "commit %(hex40)s",
    ),
    "gitlab": ("glpat-YOUR-TOKEN-HERE-PLEASE", "glpat-xxxxxxxxxxxxxxxxxxxx", "gitlab-ci-%(hex16)s"),
    "huggingface": (
        "hf_hub_download(repo_id)", "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "hf_YOUR_TOKEN", "hf_transfer",
        "from_pretrained('org/hf_model')", "HF_TOKEN=$HF_TOKEN",
    ),
    "openai": (
        "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", "sk-YOUR_KEY", "OPENAI_API_KEY=sk-...",
        "class='sk-container-id-1 sk-toggleable__content'", "task-%(hex40)s", "risk-adjusted-return-on-equity",
        "sk-proj-your-project-key-goes-here-now", "disk-%(hex40)s.img",
    ),
    "anthropic": ("sk-ant-...", "sk-ant-api03-YOUR-KEY", "sk-ant-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
    "slack": (
        "xoxb-your-token-here-please", "xoxb-xxxxxxxxxxxx-xxxxxxxxxxxx-xxxxxxxxxxxxxxxxxxxxxxxx", "foxox-1",
        "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    ),
    "stripe": (
        "sk_test_4eC39HqLyjWDarjtT1zdp7dc", "sk_live_...", "sk_test_YOUR_KEY", "task_test_%(hex16)s",
        "pk_live_%(hex16)s%(hex16)s", "disk_live_%(hex40)s",
    ),
    "npm": ("npm_config_registry=https://r.x", "npm_lifecycle_event", "npm_package_version", "npm_YOUR_TOKEN"),
    "pypi": ("pypi-AgEIcHlwaS5vcmc...", "https://pypi.org/project/x", "pypi-publish-action-for-all-of-us"),
    "jwt": (
        "eyJ...", "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9", "keyJar.eyJob.eyJoin", "eyJh.eyJz.xyz",
        "<header>.<payload>.<signature>",
    ),
    "pem": (
        "-----BEGIN PUBLIC KEY-----\n%(b64)s\n-----END PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----\n%(b64)s\n-----END CERTIFICATE-----",
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
        "if '-----BEGIN RSA PRIVATE KEY-----' in text: return True\n",
        "ssh-rsa AAAAB3NzaC1yc2E%(b64)s me",
    ),
    "url_credentials": (
        "postgres://user:password@localhost/db", "https://{user}:{password}@host/x", "redis://:%%s@host" ,
        "http://localhost:8080/@scope/pkg", "https://host/a:b@c", "mongodb://root:root@db", "http://a:${PW}@b",
        "https://user:pass@h.org", "https://YOUR_USER:YOUR_PASSWORD@api.h.org", "ssh://git@h.org:22/x.git",
    ),
    "password": (
        "password = None", "password: str", "password='your_password'", "password=os.environ['PW1']",
        "DB_PASSWORD=${PW}", "password_field = 'id_password1'", '"password": "Passwort"', "password = getpass()",
        "if password == confirm_password2:", "password: {{ vault_pw1 }}", "passed: 10/12tests", "bypass=path1x",
        "PASSWORD_HASHERS = ['django.md5x']", "password: ********", "password=<password>", "pass\nx1 = 22",
        "fields = ['password', 'email2x']", "password=changeme123", 'placeholder="Password"', "passport=AB1234567",
        "def login(password='secret'):", 'type: "password", minlength: 8', "--password-file /run/secrets/pw1",
        "password = data2['x1']", "password=self.password1,", "reset_password_url = '/a/reset1'",
    ),
    "secret": (
        "secret_name = 'prod/db/main-credentials'", "token = tokenizer.next_token(line2)",
        "token_type = 'access_token_v2_for_all'", "sort_key = '%(hex40)s'", "public_key = '%(hex64)s'",
        "commit = '%(hex40)s'", "sha256:%(hex64)s", "checksum = '%(hex64)s'", "request_id: %(uuid)s",
        "token: %(uuid)s", '"integrity": "sha512-%(b64)s=="', "md5 = '%(hex32)s'", "etag: %(hex32)s",
        "secret = 'YOUR_CLIENT_SECRET_GOES_HERE'", "API_KEY=$API_KEY_FROM_ENVIRONMENT", "rev: %(hex40)s",
        "key = 'user.profile.settings.theme2'", "api_key = get_api_key(settings2, name='primary')",
        "tokens = 123456789012345678", "secret=projects/my-project/secrets/db-pass-1",
        "cache_key = '%(hex40)s'", "token='abcdef0123456789abcdef0123456789'", "primary_key = '%(hex32)s'",
        "cookie_digest = '%(hex64)s'", "access_key_description = 'for_the_2nd_account'",
        "max_new_tokens=4096, top_k=50", "https://h.org/commit/%(hex40)s", "0x%(hex40)s",
    ),
}  # fmt: skip


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
