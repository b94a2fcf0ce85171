"""Stack Exchange dumps written as the site writes them, and broken in chosen ways."""

from xml.sax.saxutils import escape

HEADER = '\ufeff<?xml version="1.0" encoding="utf-8"?>\r\n'
ENTITIES = {'"': "&quot;", "\n": "&#xA;", "\r": "&#xD;", "\t": "&#x9;"}


def row(**attributes):
    """Return one line of a dump; an attribute that is None is left out."""
    written = "".join(
        f' {name}="{escape(str(value), ENTITIES)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"  <row{written} />\r\n"


def question(id_, **attributes):
    """Return the row of a question, with attributes added, replaced or (None) left out."""
    return row(
        **{
            "Id": id_,
            "PostTypeId": 1,
            "CreationDate": "2019-03-01T10:00:00.123",
            "Score": 5,
            "ViewCount": 10,
            "Body": f"<p>Question {id_}?</p>\n",
            "OwnerUserId": 11,
            "LastActivityDate": "2019-03-02T10:00:00.123",
            "Title": f"Title {id_}",
            "Tags": "<r><regression>",
            "AnswerCount": 1,
            "ContentLicense": "CC BY-SA 4.0",
            **attributes,
        }
    )


def answer(id_, parent, **attributes):
    """Return the row of an answer, with attributes added, replaced or (None) left out."""
    return row(
        **{
            "Id": id_,
            "PostTypeId": 2,
            "ParentId": parent,
            "CreationDate": "2019-03-01T11:00:00.456",
            "Score": 3,
            "Body": f"<p>Answer {id_}.</p>\n",
            "OwnerUserId": 12,
            "LastActivityDate": "2019-03-02T10:00:00.123",
            "CommentCount": 0,
            "ContentLicense": "CC BY-SA 4.0",
            **attributes,
        }
    )


def table(element, *lines):
    """Return the bytes of a table; lines are text or bytes."""
    body = b"".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    return f"{HEADER}<{element}>\r\n".encode() + body + f"</{element}>".encode()


def posts_xml(*lines):
    """Return the bytes of Posts.xml."""
    return table("posts", *lines)


USERS = table(
    "users",
    row(Id=-1, DisplayName="Community"),
    row(Id=11, DisplayName="Ada & Co", AboutMe="<p>I</p>"),
    row(Id=12, DisplayName="Grace"),
)


def dump_source(path, **keys):
    """Return the settings of a source that reads a dump."""
    site = "stats.stackexchange.com"
    return {"type": "stack-exchange", "id": "se", "path": str(path), "site": site, **keys}
