"""What a program reads in the answers of the tokenizer's service `encode`, a std_srvs/Trigger: flag and text alone."""

#: Begins the text of a refusal that stays one until somebody changes the tokenizer's settings. Any other refusal may be
#: none a moment later: an image comes, the node becomes active, it gets to know a subscription.
FINAL = "refused: "
