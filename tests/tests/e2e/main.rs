//! Whole-system tests: one binary, so that they link once.

mod batch;
mod boundaries;
mod bucket;
mod cases;
mod chaos;
mod demo_model;
mod durable;
mod face_model;
mod fetch;
mod fitting;
mod forms;
mod generate;
mod hub;
mod inputs;
mod memory;
mod peaks;
mod planning;
mod processes;
mod quirks;
mod resizing;
mod stack;
mod swapping;
mod weights;
mod wrong_input;
mod wrong_streams;
mod wrong_weights;
