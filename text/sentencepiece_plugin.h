// The C interface between our programs and the module that contains the SentencePiece library.
//
// Distributions build libsentencepiece with a protobuf of its own inside, whose symbols it exports.
// In one symbol scope with libprotobuf, which gRPC needs, each would run the other's code. So the
// library lives in a module (libnosara_sentencepiece.so) that is loaded into a scope of its own,
// and only plain C data crosses: no object, no allocation (docs/adr/0006-sentencepiece-module.md).
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

/// Functions of the module. All are thread-safe for one model once it is parsed.
struct NosaraSentencePieceApi {
  /// Loads the content of a tokenizer.model. Null on an error, with its text in `error`.
  void* (*parse)(const char* bytes, size_t size, char* error, size_t error_size);
  void (*destroy)(void* model);
  /// Writes the ids of `text` to `ids`, as many as fit; returns how many there are, or -1 with the
  /// reason in `error`. `without_prefix` != 0: no space is put before the text.
  int64_t (*encode)(const void* model, const char* text, size_t size, int without_prefix,
                    int32_t* ids, size_t capacity, char* error, size_t error_size);
  int32_t (*size)(const void* model);
  /// The bytes of a piece, which live as long as the model.
  const char* (*piece)(const void* model, int32_t id, size_t* size);
  /// 0 normal, 1 unknown, 2 control, 3 byte, 4 unused.
  int32_t (*kind)(const void* model, int32_t id);
  int32_t (*unk_id)(const void* model);
  int32_t (*bos_id)(const void* model);
  int32_t (*eos_id)(const void* model);
  int32_t (*has_prefix)(const void* model);
};

/// The module's one symbol.
const NosaraSentencePieceApi* nosara_sentencepiece_api();

}  // extern "C"
