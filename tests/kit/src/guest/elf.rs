//! An ELF file around machine code: one header, one segment, nothing else.

/// Where the code is loaded and entered: 16 MiB.
pub const ENTRY: u64 = 16 << 20;

const HEADERS: u64 = 64 + 56;

/// The file that Firecracker takes for a kernel.
///
/// It has no notes, so Firecracker enters it by the 64-bit Linux boot protocol: in long mode, with the
/// first GiB identity-mapped and interrupts off.
pub(super) fn executable(code: &[u8]) -> Vec<u8> {
    let size = u64::try_from(code.len()).expect("code is short");
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    file.resize(16, 0);
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let long = |file: &mut Vec<u8>, value: u64| file.extend(value.to_le_bytes());

    half(&mut file, 2); // an executable
    half(&mut file, 62); // for x86-64
    word(&mut file, 1); // ELF version
    long(&mut file, ENTRY);
    long(&mut file, 64); // the program header follows at once
    long(&mut file, 0); // no section headers
    word(&mut file, 0); // flags
    half(&mut file, 64); // size of this header
    half(&mut file, 56); // size of a program header
    half(&mut file, 1); // one of them
    half(&mut file, 64); // size of a section header
    half(&mut file, 0); // none of them
    half(&mut file, 0);

    word(&mut file, 1); // to be loaded
    word(&mut file, 7); // read, write, execute
    long(&mut file, HEADERS); // from here in the file
    long(&mut file, ENTRY); // to this virtual
    long(&mut file, ENTRY); // and physical address
    long(&mut file, size);
    long(&mut file, size);
    long(&mut file, 8); // alignment

    file.extend(code);
    file
}

#[cfg(test)]
mod tests {
    use super::{HEADERS, executable};

    #[test]
    fn the_code_stands_where_the_header_says() {
        let file = executable(&[0xfa, 0xf4]);
        let offset = u64::from_le_bytes(file[64 + 8..64 + 16].try_into().unwrap());
        let size = u64::from_le_bytes(file[64 + 32..64 + 40].try_into().unwrap());
        assert_eq!((offset, size), (HEADERS, 2));
        assert_eq!(file[120..], [0xfa, 0xf4]);
    }
}
