//! The gRPC API of a running machine and the places where machines are found.
