"""Posts of a Stack Exchange site as rows: what dump and API have in common."""

import pyarrow as pa

QUESTION, ANSWER = 1, 2

POST_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("type", pa.int8(), nullable=False),  # PostTypeId: 1 question, 2 answer
        pa.field("parent", pa.int64()),  # the question of an answer
        pa.field("accepted", pa.int64()),  # the accepted answer of a question
        pa.field("score", pa.int32(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("body", pa.string(), nullable=False),  # HTML
        pa.field("tags", pa.list_(pa.string())),
        pa.field("author", pa.string()),  # display name, None for a deleted owner
        pa.field("author_id", pa.int64()),
        pa.field("created", pa.string(), nullable=False),  # ISO 8601, UTC
        pa.field("edited", pa.string()),
        pa.field("active", pa.string()),
        pa.field("closed", pa.string()),
        pa.field("license", pa.string()),  # as the row says, None where it says nothing
    ]
)
