-- Where traces are on: the span that an event was written under, which its consumers' spans are children of.
ALTER TABLE outbox ADD COLUMN traceparent text NOT NULL DEFAULT '';
