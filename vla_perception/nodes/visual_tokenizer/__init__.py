"""Node `visual_tokenizer`: camera topics in, one topic of visual tokens out.

Words:
    frame: one image of one camera with its stamp; frame set: frames of all cameras that belong together.
    received = encoded + replaced + unmatched + undecodable + pending: every frame is in one of these counts.
    pending: still in flight (buffered, matched or being encoded).
    health problem: why a camera gives no frames, and what to do about it.
    generation: counts starts of the pipeline; results of an earlier one are not published.

Modules, in the order of a frame's way:
    node             lifecycle; puts the parts together
    parameters       the table: default, description, range, when each may change
    loading          the model, in a thread: the node answers meanwhile, and can end
    cameras          subscriptions, their QoS, health problems (vla_perception/synchronizer.py matches their frames)
    pipeline         frame sets -> decoded images -> tokens -> published, in threads with single-slot mailboxes
    job              what the pipeline's threads hand on
    frame_decoder    messages of a frame set -> images and views
    encode           prepared images -> the message with their tokens
    token_publisher  the topic `tokens`, and shared memory beside it
    device_errors    which errors of a GPU end its use in this process
    levels           ok, warning or error, from measurements and thresholds
    bond             the heartbeat that a lifecycle manager expects
    diagnostics      /diagnostics, and repeated failures in the log
"""
