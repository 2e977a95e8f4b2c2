-- The minute that is stamped in a call's frame, for the conservation audit: the
-- same at every point, however late the frame came. Rows from before this column
-- say 1970; the audit leaves them out.
ALTER TABLE calls ADD COLUMN IF NOT EXISTS
    frame_minute DateTime('UTC') DEFAULT toDateTime(0, 'UTC') COMMENT 'minute of the frame''s sealing; without a frame that of stream_time' CODEC(Delta(4), ZSTD(1));
