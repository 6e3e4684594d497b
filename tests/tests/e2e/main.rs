//! Whole-system tests: one binary, so that they link once.

mod boundaries;
mod cases;
mod forms;
mod generate;
mod inputs;
mod processes;
mod stack;
mod wrong_input;
mod wrong_streams;
mod wrong_weights;
