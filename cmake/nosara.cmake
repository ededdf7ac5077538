# Flags and helper functions of all our targets.

add_library(nosara_flags INTERFACE)
target_include_directories(nosara_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_definitions(nosara_flags INTERFACE NOSARA_VERSION="${PROJECT_VERSION}")
target_compile_options(nosara_flags INTERFACE
  -Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers
  -fno-math-errno -fno-trapping-math -march=${NOSARA_CPU})
if(NOSARA_SANITIZE)
  add_compile_options(-fsanitize=${NOSARA_SANITIZE} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${NOSARA_SANITIZE})
  # GCC's uninitialised-use analysis reports false positives in instrumented code.
  target_compile_options(nosara_flags INTERFACE -Wno-maybe-uninitialized -Wno-tsan)
endif()

# nosara_library(<name> SRCS a.cc ... DEPS lib ...): one static library, one concept.
function(nosara_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  if(ARG_SRCS)
    add_library(${name} STATIC ${ARG_SRCS})
    target_link_libraries(${name} PUBLIC nosara_flags ${ARG_DEPS})
  else()
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE nosara_flags ${ARG_DEPS})
  endif()
endfunction()

# nosara_binary(<name> SRCS main.cc ... DEPS lib ...): a program in build/<preset>/bin.
function(nosara_binary name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE nosara_flags ${ARG_DEPS})
endfunction()

# What the sanitizers must be told of libraries that are not built with them; the programs that tests
# start inherit it.
set(NOSARA_TEST_ENVIRONMENT "")
if(NOSARA_SANITIZE)
  # UCX's hooks into the memory allocator and those of the sanitizers do not go together.
  list(APPEND NOSARA_TEST_ENVIRONMENT UCX_MEM_EVENTS=n)
endif()
if(NOSARA_SANITIZE MATCHES "address")
  # The SentencePiece module (docs/adr/0006-sentencepiece-module.md) finds libstdc++'s operator new
  # before the sanitizer's, and the sanitizer's operator delete.
  list(APPEND NOSARA_TEST_ENVIRONMENT
       ASAN_OPTIONS=alloc_dealloc_mismatch=0
       UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1)
endif()
if(NOSARA_SANITIZE MATCHES "thread")
  list(APPEND NOSARA_TEST_ENVIRONMENT
       "TSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/tsan_suppressions.txt:ignore_noninstrumented_modules=1")
endif()

# nosara_test(<name> LABEL unit|integration|gpu|chaos|soak [TIMEOUT s] SRCS ... DEPS ...): a
# GoogleTest program, run by CTest from the source root, so that tests name files by their path.
function(nosara_test name)
  cmake_parse_arguments(ARG "" "LABEL;TIMEOUT" "SRCS;DEPS" ${ARGN})
  if(NOT ARG_LABEL)
    message(FATAL_ERROR "nosara_test(${name}): LABEL is missing")
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(NOSARA_SANITIZE)
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 3")
  endif()
  add_executable(${name} ${ARG_SRCS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  target_link_libraries(${name} PRIVATE nosara_flags ${ARG_DEPS} GTest::gmock GTest::gtest
                                        GTest::gtest_main)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  set_tests_properties(${name} PROPERTIES LABELS ${ARG_LABEL} TIMEOUT ${ARG_TIMEOUT}
                                          ENVIRONMENT "${NOSARA_TEST_ENVIRONMENT}")
endfunction()
